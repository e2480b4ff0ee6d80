"""The third stage: a model of spandrel enlarges pictures, large ones in tiles.

upscaler = Upscaler.open(Path("4x-UltraSharp.safetensors"), device="cpu")
upscaler.enlarge(picture)                                # uint8 [4 * height, 4 * width, 3]
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mergetool import packages
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError, DeviceError, NonFiniteError
from mergetool.sampler import load
from mergetool.sampler.request import Enlargement, Pictures, StepCounter

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

TILE = 512
"""Pixels a side that go through the model at once, those around a tile's own among them; as many as ComfyUI takes."""

LEAST_TILE = 128
MARGIN = 32
"""Pixels around a tile's own that the model sees too. A multiple of the windows of attention (8, 16, 32), so that those of tiles are the picture's."""

_PICKLES = (b"PK\x03\x04", b"\x80")


@dataclass
class Upscaler:
    """An upscaler in float32 on a device; ``notes`` get a sentence on each change of plan."""

    stage: Enlargement
    net: ImageModelDescriptor[Any]
    device: str = "cpu"
    notes: list[str] = field(default_factory=list)
    tile: int = TILE

    @classmethod
    def open(cls, path: Path, *, device: str = "cpu", notes: list[str] | None = None) -> Upscaler:
        """Open a file of any architecture that spandrel knows.

        It is safetensors, or a pickle that holds tensors alone. A pickle goes through torch's loader of tensors, which runs no code. Raises PackageError without spandrel, InputMissing for a file that is
        not there, and DataError for one that is no upscaler of colour pictures.
        """
        packages.require("spandrel")
        import spandrel

        state = _state(path)
        try:
            with load.quiet(), load.readable(path, "upscaler"):
                net = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(state))
        except spandrel.UnsupportedModelError:
            raise DataError(
                f'"{path}" is of no architecture that spandrel {spandrel.__version__} knows; name an upscaler, as an ESRGAN of scale 4.'
            ) from None
        if not isinstance(net, spandrel.ImageModelDescriptor):
            raise DataError(f'"{path}" ({net.architecture.name}) fills in masked pictures; name an upscaler.')
        if (net.input_channels, net.output_channels) != (3, 3):
            raise DataError(
                f'"{path}" makes {net.output_channels} channels of {net.input_channels}, and pictures have 3; name one for colour.'
            )
        net.model.eval().requires_grad_(False)
        stage = Enlargement(str(path), net.architecture.name, net.scale, f"sha256:{_digest(path)}")
        upscaler = cls(stage, net, device, [] if notes is None else notes)
        if net.tiling is not spandrel.ModelTiling.SUPPORTED:
            upscaler.tile = 0
            upscaler.notes.append(f"{path.name} sees each picture whole, so its memory grows with the picture.")
        return upscaler

    def tiles(self, size: tuple[int, int]) -> int:
        """Count the tiles of a picture of ``size`` = (width, height)."""
        width, height = (len(list(_cells(side, self.tile, MARGIN))) for side in size)
        return width * height

    def enlarge(self, picture: Pictures, *, progress: StepCounter = lambda _: None) -> Pictures:
        """Enlarge a picture uint8 [height, width, 3] by the model's scale, on the device.

        Tiles are halved where a GPU's memory does not suffice. Raises DeviceError where it does not suffice at all, and NonFiniteError.
        """
        image = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None].float() / 255
        net = self.net.to(self.device)
        while True:
            try:
                large = tiled(self._run, image, net.scale, self.tile, done=progress)
                break
            except torch.OutOfMemoryError:
                if self.tile < 2 * LEAST_TILE:
                    raise DeviceError(
                        f"the memory of {self.device} is too small for {self.stage.model}; take `device=cpu`."
                    ) from None
                self.tile //= 2
                self.notes.append(f"the third stage goes on in tiles of {self.tile} pixels: {self.device} was full.")
                torch.cuda.empty_cache()
        if not torch.isfinite(large).all():
            raise NonFiniteError(f"{self.stage.model} makes NaN or infinity of a picture; get the file again.")
        return np.ascontiguousarray((large[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())

    def _run(self, image: Tensor) -> Tensor:
        with load.quiet(), torch.inference_mode():
            enlarged: Tensor = self.net(image.to(self.device)).cpu()
        return enlarged


def tiled(
    run: Callable[[Tensor], Tensor],
    image: Tensor,
    scale: int,
    tile: int = TILE,
    margin: int = MARGIN,
    *,
    done: StepCounter = lambda _: None,
) -> Tensor:
    """Run an upscaler over ``image`` in tiles of at most ``tile`` pixels a side, 0 for one.

    The image is [1, channels, height, width]. Returns float32 [1, channels, scale * height, scale * width].

    A tile sees ``margin`` pixels around its own. The outer half of them only informs the model; over the inner half and as many of its own pixels
    it fades into its neighbour. So the result is that of the whole image, up to rounding, where the model looks no further than half of
    ``margin``. Memory is that of one tile, and 4 bytes for each value of the result.
    """
    _, channels, height, width = image.shape
    made = torch.zeros(1, channels, height * scale, width * scale)
    for above, below, down in _cells(height, tile, margin, scale):
        for left, right, across in _cells(width, tile, margin, scale):
            part = run(image[..., above:below, left:right]).float()
            place = made[..., above * scale : below * scale, left * scale : right * scale]
            place += part * down[:, None] * across
            done(1)
    return made


def _cells(length: int, tile: int, margin: int, scale: int = 1) -> Iterator[tuple[int, int, Tensor]]:
    """The beginning and end of each tile along a side, and the weights of its enlarged pixels; all tiles' add up to 1."""
    step = length if tile == 0 or length <= tile else tile - 2 * margin
    fade = margin / 2
    for start in range(0, length, step):
        end = start + step
        first, last = max(0, start - margin), min(length, end + margin)
        at = (torch.arange(first * scale, last * scale) + 0.5) / scale
        weights = torch.ones(len(at))
        if start > 0:
            weights *= ((at - start + fade) / margin).clamp(0, 1)
        if end < length:
            weights *= 1 - ((at - end + fade) / margin).clamp(0, 1)
        yield first, last, weights


def _state(path: Path) -> Mapping[str, Any]:
    """The tensors of a file by name; those of a pickle may lie in mappings."""
    with path.open("rb") as file:
        is_pickle = file.read(4).startswith(_PICKLES)
    if not is_pickle:
        with Checkpoint.open(path) as checkpoint:
            return {name: load.whole(checkpoint, name) for name in checkpoint.tensors}
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        raise DataError(
            f'"{path}" is a pickle that holds more than tensors, or is not whole, and is not loaded; take the model as a .safetensors file.'
        ) from None
    if not isinstance(loaded, Mapping):
        raise DataError(f'"{path}" holds no tensors by name; take the model as a .safetensors file.')
    return loaded


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
