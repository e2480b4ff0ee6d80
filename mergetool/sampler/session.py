"""One request to the sampler: every prompt and seed through a first stage and any number of second ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from mergetool.errors import DataError, InputMissing, UsageError
from mergetool.sampler.load import Components
from mergetool.sampler.studio import Pictures, Progress, Refinement, Shot, Stage, Studio

Handoff = Literal["latent", "pixels"]

MAX_PIXELS = 64_000_000


@dataclass(frozen=True, slots=True)
class Request:
    """What to make: each shot by ``first`` (or from ``start``, one picture for all), then by each of ``refinements``.

    ``start`` is uint8 [height, width, 3]. ``handoff`` says how latents reach a second stage: as they are, or decoded by
    the first model's VAE, rounded to 8 bits and encoded by ``refiner_parts``' own, which another family needs.
    """

    shots: tuple[Shot, ...]
    size: tuple[int, int]
    first: Stage | None = None
    refinements: tuple[Refinement, ...] = ()
    start: Pictures | None = None
    handoff: Handoff = "latent"
    refiner_parts: Components | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for a request that makes nothing, or takes its pictures from two places."""
        if (self.first is None) == (self.start is None):
            raise UsageError("a picture comes from --base or from --init-image: give one of them.")
        if self.first is None and not self.refinements:
            raise UsageError("--init-image is the start of a second stage: name its model with --refiner.")
        if not self.shots:
            raise UsageError("there is no prompt; give one, or a file of them with --prompts.")

    @property
    def evaluations(self) -> int:
        """How often a transformer is asked, guidance counted once."""
        stages = [*([self.first] if self.first else []), *self.refinements]
        return len(self.shots) * sum(len(stage.levels()) - 1 for stage in stages)


@dataclass(frozen=True, slots=True)
class Made:
    """A picture uint8 [height, width, 3] and everything that made it."""

    picture: Pictures
    parameters: dict[str, Any]


def make(studio: Studio, request: Request, *, progress: Progress = lambda _: None) -> list[list[Made]]:
    """For every shot, the first stage's picture (if there is one) and that of each refinement.

    Raises what `Studio.first_stage` and `Studio.second_stage` raise.
    """
    shots = request.shots
    columns: list[tuple[Stage | None, Refinement | None, Tensor]] = []
    if request.first is not None:
        latents = studio.first_stage(request.first, shots, request.size, progress=progress)
        columns.append((request.first, None, latents))
    second = studio
    if request.handoff == "pixels" and request.refiner_parts is not None:
        second = Studio(request.refiner_parts, studio.device, studio.dtype)
    if request.refinements:
        given = _handed_over(studio, second, request, columns[0][2] if columns else None)
        for refinement in request.refinements:
            refined = second.second_stage(refinement, shots, given, progress=progress)
            columns.append((request.first, refinement, refined))
    pictures = [(second if stage2 else studio).decode(latents) for _, stage2, latents in columns]
    return [
        [
            Made(shown[row], _parameters(request, shots[row], stage1, stage2))
            for (stage1, stage2, _), shown in zip(columns, pictures, strict=True)
        ]
        for row in range(len(shots))
    ]


def _handed_over(studio: Studio, second: Studio, request: Request, latents: Tensor | None) -> Tensor:
    if latents is None:
        assert request.start is not None
        return second.encode(request.start[None]).repeat(len(request.shots), 1, 1, 1)
    return latents if request.handoff == "latent" else second.encode(studio.decode(latents))


def _parameters(request: Request, shot: Shot, first: Stage | None, second: Refinement | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt": shot.prompt,
        "negative": shot.negative,
        "seed": shot.seed,
        "size": list(request.size),
        "first": None if first is None else _stage(first),
        "second": None if second is None else _stage(second),
    }
    if second is not None:
        found |= {
            "refine_prompt": shot.second_prompt,
            "refine_seed": shot.second_seed,
            "handoff": request.handoff if first else "init image",
        }
    return found


def _stage(stage: Stage) -> dict[str, Any]:
    """A stage as recorded: with the level it starts from and how often the model is asked."""
    reached = stage.levels()
    found: dict[str, Any] = {
        "model": stage.model,
        "steps": stage.steps,
        "guidance": stage.guidance,
        "shift": stage.shift,
        "start_sigma": reached[0],
        "evaluations": len(reached) - 1,
        "loras": {str(lora.path.name): lora.strength for lora in stage.loras},
    }
    if isinstance(stage, Refinement):
        found |= {"strength": stage.strength, "strength_as": stage.strength_as}
    return found


def read_picture(path: Path) -> Pictures:
    """A picture file as uint8 [height, width, 3]. Raises InputMissing or DataError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f'"{path}" has {image.width} x {image.height} pixels; {MAX_PIXELS} are the limit.')
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise InputMissing(f'"{path}" does not exist; check the path of --init-image.') from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f'"{path}" is not a picture that can be read ({type(error).__name__}).') from None


def read_prompts(path: Path) -> Sequence[str]:
    """One prompt a line; empty lines and those that begin with # are left out. Raises InputMissing or DataError."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise InputMissing(f'"{path}" does not exist; check the path of --prompts.') from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'"{path}" is not a text file that can be read ({type(error).__name__}).') from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
