"""One request to the sampler: every prompt and seed, a first stage, then second ones.

There can be any number of second stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergetool.sampler.request import PictureRequest, Pictures, Refinement, Shot, Stage
from mergetool.sampler.studio import StepCounter, Studio


@dataclass(frozen=True, slots=True)
class MadePicture:
    """A picture uint8 [height, width, 3] and everything that made it."""

    picture: Pictures
    parameters: dict[str, Any]


def make(studio: Studio, request: PictureRequest, *, progress: StepCounter = lambda _: None) -> list[list[MadePicture]]:
    """Make every shot's pictures: the first stage's, if any, then each refinement's.

    Raises what `Studio.first_stage` and `Studio.second_stage` raise.
    """
    shots = request.shots
    columns: list[tuple[Stage | None, Refinement | None, Tensor]] = []
    if request.first is not None:
        latents = studio.first_stage(request.first, shots, request.size, progress=progress)
        columns.append((request.first, None, latents))
    second = studio
    if request.handoff == "pixels" and request.refiner_parts is not None:
        second = Studio(request.refiner_parts, studio.device, studio.dtype, studio.notes)
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


def _handed_over(studio: Studio, second: Studio, request: PictureRequest, latents: Tensor | None) -> Tensor:
    if latents is None:
        assert request.start is not None
        return second.encode(request.start[None]).repeat(len(request.shots), 1, 1, 1)
    return latents if request.handoff == "latent" else second.encode(studio.decode(latents))


def _parameters(request: PictureRequest, shot: Shot, first: Stage | None, second: Refinement | None) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "prompt": shot.prompt,
        "negative": shot.negative,
        "seed": shot.seed,
        "size": list(request.size),
        "first": None if first is None else _stage(first),
        "second": None if second is None else _stage(second),
    }
    if second is not None:
        parameters |= {
            "refine_prompt": shot.second_prompt,
            "refine_seed": shot.second_seed,
            "handoff": request.handoff if first else "init image",
        }
    return parameters


def _stage(stage: Stage) -> dict[str, Any]:
    """A stage as recorded: with the level it starts from and how often the model is asked."""
    parameters: dict[str, Any] = {
        "model": stage.model,
        "steps": stage.steps,
        "guidance": stage.guidance,
        "shift": stage.shift,
        "sampler": stage.sampler,
        "scheduler": stage.scheduler,
        "start_sigma": stage.levels()[0],
        "evaluations": stage.evaluations,
        "loras": {str(lora.path.name): lora.strength for lora in stage.loras},
    }
    if isinstance(stage, Refinement):
        parameters |= {"strength": stage.strength, "strength_as": stage.strength_as}
    return parameters
