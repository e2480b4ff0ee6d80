"""A folder with diffusers' pipeline of another family: recognise it, check that it is whole.

Only model_index.json and configs are read; neither torch nor diffusers is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergetool import models
from mergetool.arch.families import sampling_of
from mergetool.arch.sampling import SamplingDefaults
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.options.sampling import FIRST
from mergetool.recipe.argument import expression_of
from mergetool.sampler.parts import json_object, pipeline_of

OWN = "ZImage"
"""Pipelines whose class begins so are drawn by `Studio`, with ComfyUI's samplers."""

FROM_PICTURES = "Img2Img"
"""The part of a class's name in diffusers for one that draws from pictures."""

LIBRARIES = ("diffusers", "transformers")
DENOISERS = ("transformer", "unet")
PIXELS = {"unet": 8, "transformer": 16}
"""Both sides of a picture are multiples of this many pixels."""

SIDE = 1024
"""Pixels a side where a config does not say."""


@dataclass(frozen=True, slots=True)
class PipelineFolder:
    """A folder that diffusers loads a text-to-image pipeline from.

    ``model`` is None where the folder's own denoiser draws, else the MODEL whose weights take its place.
    """

    path: Path
    kind: str
    denoiser: str
    model: str | None

    @classmethod
    def of(cls, model: str, pipeline: str | None) -> PipelineFolder | None:
        """The pipeline that draws a MODEL: its own folder, else that of ``pipeline``. None where `Studio` draws it.

        Raises DataError for a model_index.json that cannot be read or names classes of other libraries.
        """
        own = pipeline_of(model)
        path = own or (None if pipeline is None else pipeline_of(pipeline))
        if path is None:
            return None
        index = json_object(path / "model_index.json")
        kind = index.get("_class_name")
        if not isinstance(kind, str):
            raise DataError(f'"{path / "model_index.json"}" names no class of diffusers; get the file again.')
        if kind.startswith(OWN):
            return None
        for name, value in index.items():
            if isinstance(value, list) and value[0] is not None and value[0] not in LIBRARIES:
                raise DataError(
                    f'the {name} of "{path}" comes from "{value[0]}", and code of a model\'s folder is never run; '
                    "take a pipeline whose parts are diffusers' and transformers' own."
                )
        denoiser = next((name for name in DENOISERS if name in index), None)
        if denoiser is None:
            raise DataError(
                f'the {kind} in "{path}" has neither a transformer nor a unet; it is no text-to-image pipeline.'
            )
        return cls(path, kind, denoiser, None).drawing(model)

    def drawing(self, model: str) -> PipelineFolder:
        """The same parts around the weights of a MODEL."""
        own = expression_of(model) is None and models.resolve(model).path in (self.path, self.path / self.denoiser)
        return replace(self, model=None if own else model)

    @property
    def stem(self) -> str:
        """The part of the class's name that pipelines of one family share."""
        return self.kind.removesuffix("Pipeline").removesuffix(FROM_PICTURES)

    @property
    def needs_pictures(self) -> bool:
        """Whether it draws from pictures alone, as SDXL's refiner does."""
        return self.kind == self.kind_from_pictures

    @property
    def kind_from_pictures(self) -> str:
        """The class that draws from pictures, if diffusers has one."""
        return f"{self.stem}{FROM_PICTURES}Pipeline"

    def shares_latents(self, other: PipelineFolder) -> bool:
        """Whether another goes on from this one's latents: both are of one family and have one VAE."""
        if self.stem != other.stem:
            return False
        places = [folder.path / "vae" for folder in (self, other)]
        if places[0] == places[1]:
            return True
        with Checkpoint.open(places[0]) as one, Checkpoint.open(places[1]) as two:
            return one.fingerprint() == two.fingerprint()

    @property
    def config(self) -> Mapping[str, Any]:
        """The denoiser's config. Raises DataError."""
        return json_object(self.path / self.denoiser / "config.json")

    @property
    def defaults(self) -> SamplingDefaults:
        """The settings of its family, else its own guidance at the usual number of steps."""
        index = json_object(self.path / "model_index.json")
        known = sampling_of(self.stem, {**index, **self.config})
        return known or SamplingDefaults(self.stem, FIRST.steps, unit=PIXELS[self.denoiser])

    @property
    def shift(self) -> str:
        """The shift of its scheduler in words, "" where that has none."""
        path = self.path / "scheduler" / "scheduler_config.json"
        config = json_object(path) if path.is_file() else {}
        if config.get("use_dynamic_shifting"):
            return "shift by size"
        shift = config.get("flow_shift" if config.get("use_flow_sigmas") else "shift")
        return f"shift {shift:g}" if isinstance(shift, int | float) else ""

    @property
    def picture_unit(self) -> int:
        """Pixels that both sides of a picture are multiples of."""
        return self.defaults.unit

    @property
    def picture_side(self) -> int:
        """Pixels a side of a picture by default."""
        side = self.config.get("sample_size")
        return self.defaults.side or (8 * side if isinstance(side, int) and side > 0 else SIDE)

    def check(self) -> None:
        """Raises DataError for a folder that lacks a part, or has one as a pickle only."""
        index = json_object(self.path / "model_index.json")
        for name, value in index.items():
            if not isinstance(value, list) or value[0] is None:
                continue
            folder = self.path / name
            if not folder.is_dir():
                raise DataError(
                    f'"{self.path}" lacks the folder "{name}" that its model_index.json names; get all of its files.'
                )
            stored = [path.suffix for path in folder.iterdir()]
            if {".bin", ".ckpt", ".pt"} & set(stored) and ".safetensors" not in stored:
                raise DataError(
                    f'"{folder}" has no safetensors file, and pickles are never loaded; get its safetensors files.'
                )
