"""One request to the sampler: every prompt and seed, a first stage, then second ones.

There can be any number of second stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from mergetool.engine import device as devices
from mergetool.sampler.diffusers_studio import DiffusersStudio
from mergetool.sampler.parts import Components
from mergetool.sampler.pipeline_folder import PipelineFolder
from mergetool.sampler.request import (
    PictureRequest,
    Pictures,
    PipelineRefinement,
    PipelineStage,
    Refinement,
    Shot,
    Stage,
    StepCounter,
)
from mergetool.sampler.studio import Studio, dtype_of

if TYPE_CHECKING:
    from mergetool.sampler.settings import Prepared
    from mergetool.sampler.upscaler import Upscaler


class Drawer(Protocol):
    """The interface that draws a stage: `Studio` for Z-Image, `DiffusersStudio` for others.

    Stages of the first end in latents, of the second in pictures.
    """

    device: str
    dtype: torch.dtype
    notes: list[str]

    def first_stage(
        self, stage: Any, shots: Sequence[Shot], size: tuple[int, int], *, progress: StepCounter = ...
    ) -> Any:
        """Draw every shot from pure noise."""

    def second_stage(self, stage: Any, shots: Sequence[Shot], latents: Any, *, progress: StepCounter = ...) -> Any:
        """Draw every shot again from a first stage's result."""

    def decode(self, latents: Any) -> Pictures:
        """Turn a stage's result into pictures."""

    def encode(self, pictures: Pictures) -> Any:
        """Turn pictures into the start of a second stage."""


@dataclass(frozen=True, slots=True)
class MadePicture:
    """A picture uint8 [height, width, 3] and everything that made it.

    ``unscaled`` is the picture before a third stage, None where there is none.
    """

    picture: Pictures
    parameters: dict[str, Any]
    unscaled: Pictures | None = None


def drawer(parts: Components | PipelineFolder, device: str, dtype: torch.dtype, notes: list[str]) -> Drawer:
    """Choose the drawer for these parts: Z-Image's own studio, or a pipeline of diffusers."""
    if isinstance(parts, PipelineFolder):
        return DiffusersStudio(parts, device, dtype, notes)
    return Studio(parts, device, dtype, notes)


def opened(prepared: Prepared) -> Drawer:
    """Open the drawer of a request's first stage. Raises UsageError for a device that is not there."""
    return drawer(prepared.parts, devices.torch_device(prepared.device), dtype_of(prepared.dtype), [])


def opened_upscaler(prepared: Prepared, studio: Drawer) -> Upscaler | None:
    """Open the upscaler of a request's third stage, if any, on the drawer's device. Raises as `Upscaler.open`."""
    if prepared.upscale is None:
        return None
    from mergetool.sampler.upscaler import Upscaler

    return Upscaler.open(prepared.upscale, device=studio.device, notes=studio.notes)


def second_drawer(studio: Drawer, request: PictureRequest) -> Drawer:
    """The drawer of the second stages: the first's, where they have no parts of their own."""
    if request.refiner_parts is None:
        return studio
    return drawer(request.refiner_parts, studio.device, studio.dtype, studio.notes)


def make(
    studio: Drawer,
    request: PictureRequest,
    second: Drawer | None = None,
    *,
    progress: StepCounter = lambda _: None,
) -> list[list[MadePicture]]:
    """Make every shot's pictures: the first stage's, if any, then each refinement's.

    ``second`` draws the second stages; without one they get a `second_drawer`. Raises what the drawers' stages raise, as `Studio.first_stage` and `DiffusersStudio.second_stage`.
    """
    shots = request.shots
    columns: list[tuple[Any, Any, Any]] = []
    if request.first is not None:
        latents = studio.first_stage(request.first, shots, request.size, progress=progress)
        columns.append((request.first, None, latents))
    second = second or second_drawer(studio, request)
    if request.refinements:
        given = _handed_over(studio, second, request, columns[0][2] if columns else None)
        for refinement in request.refinements:
            refined = second.second_stage(refinement, shots, given, progress=progress)
            columns.append((request.first, refinement, refined))
    pictures = [(second if stage2 else studio).decode(latents) for _, stage2, latents in columns]
    return [
        [
            MadePicture(shown[row], _parameters(request, shots[row], stage1, stage2))
            for (stage1, stage2, _), shown in zip(columns, pictures, strict=True)
        ]
        for row in range(len(shots))
    ]


def enlarge(
    made: Sequence[Sequence[MadePicture]],
    request: PictureRequest,
    upscaler: Upscaler,
    *,
    progress: StepCounter = lambda _: None,
) -> list[list[MadePicture]]:
    """Enlarge every last stage's pictures; those of a first stage before it stay. Raises as `Upscaler.enlarge`."""

    def enlarged(drawn: MadePicture) -> MadePicture:
        record = upscaler.stage.record(request.size)
        large = upscaler.enlarge(drawn.picture, progress=progress)
        return MadePicture(large, drawn.parameters | {"upscale": record}, drawn.picture)

    return [[*row[: -request.last], *map(enlarged, row[-request.last :])] for row in made]


def _handed_over(studio: Drawer, second: Drawer, request: PictureRequest, latents: Any) -> Any:
    if latents is None:
        assert request.start is not None
        encoded = second.encode(request.start[None])
        return encoded[[0] * len(request.shots)]
    return latents if request.handoff == "latent" else second.encode(studio.decode(latents))


def _parameters(
    request: PictureRequest,
    shot: Shot,
    first: Stage | PipelineStage | None,
    second: Refinement | PipelineRefinement | None,
) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "prompt": shot.prompt,
        "negative": shot.negative,
        "seed": shot.seed,
        "size": list(request.size),
        "first": None if first is None else first.record(),
        "second": None if second is None else second.record(),
    }
    if second is not None:
        parameters |= {
            "refine_prompt": shot.second_prompt,
            "refine_seed": shot.second_seed,
            "handoff": request.handoff if first else "init image",
        }
    return parameters | ({"fingerprints": dict(request.fingerprints)} if request.fingerprints else {})
