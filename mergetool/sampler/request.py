"""Requests to the sampler: shots, stages, and both in one. Plain values; nothing is loaded for them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergetool.errors import UsageError
from mergetool.options.sampling import SEEDS, Handoff, SamplerName, Scheduler, StrengthMeaning
from mergetool.sampler.parts import Components, WeightedLora
from mergetool.sampler.pipeline_folder import PipelineFolder
from mergetool.sampler.schedule import levels, refinement_levels

Pictures = NDArray[np.uint8]

StepCounter = Callable[[int], None]
"""Told how many evaluations of a model were done since it was last told."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture to make. ``refine_prompt`` and ``refine_seed`` are the second stage's; by default the prompt again and
    the seed after this one, so that the two stages' noises are independent.
    """

    prompt: str
    seed: int = 0
    negative: str = ""
    refine_prompt: str | None = None
    refine_seed: int | None = None

    @property
    def second_prompt(self) -> str:
        return self.prompt if self.refine_prompt is None else self.refine_prompt

    @property
    def second_seed(self) -> int:
        return (self.seed + 1) % SEEDS if self.refine_seed is None else self.refine_seed


@dataclass(frozen=True, slots=True)
class Stage:
    """A model and how to sample it.

    ``guidance`` is diffusers' (ComfyUI's cfg less 1): 0 for none, and below 0, which diffusers takes for 0, a mix with the negative
    as ComfyUI makes it.
    """

    model: str
    steps: int = 30
    guidance: float = 0.0
    shift: float = 3.0
    loras: tuple[WeightedLora, ...] = ()
    sampler: SamplerName = "euler"
    scheduler: Scheduler = "simple"

    def levels(self) -> tuple[float, ...]:
        return levels(self.steps, self.shift, self.scheduler)

    @property
    def evaluations(self) -> int:
        """Count the transformer's evaluations, guidance counted once.

        There is one at every level but the last, repeated ones once.
        """
        return len(list(itertools.groupby(self.levels()))) - 1

    @property
    def guided(self) -> str:
        """The guidance, in words."""
        return f"guidance {self.guidance:g}"

    @property
    def begins(self) -> str:
        """The noise level that it begins from, in words that follow its number of evaluations."""
        return f" from sigma {self.levels()[0]:.3f}"

    def record(self) -> dict[str, Any]:
        """The stage in a picture's metadata, with its first level and its number of evaluations."""
        return {
            "model": self.model,
            "steps": self.steps,
            "guidance": self.guidance,
            "shift": self.shift,
            "sampler": self.sampler,
            "scheduler": self.scheduler,
            "start_sigma": self.levels()[0],
            "evaluations": self.evaluations,
            "loras": {str(lora.path.name): lora.strength for lora in self.loras},
        }


@dataclass(frozen=True, slots=True)
class PipelineStage:
    """A stage that a pipeline of diffusers draws, with its own sampler and schedule.

    ``kind`` is the pipeline's class, ``shift`` its scheduler's in words. A ``guidance`` or ``cfg`` of None is the pipeline's default, or none at all
    for a model that ``takes_guidance`` says takes none.
    """

    model: str
    kind: str
    steps: int
    guidance: float | None = None
    cfg: float | None = None
    shift: str = ""
    takes_guidance: bool = True

    @property
    def evaluations(self) -> int:
        """Count the steps, guidance counted once."""
        return self.steps

    @property
    def guided(self) -> str:
        """The guidance, in words."""
        given = {"guidance": self.guidance, "cfg": self.cfg}
        named = ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        return named or ("its own guidance" if self.takes_guidance else "no guidance")

    @property
    def begins(self) -> str:
        """Nothing: the pipeline has a schedule of its own."""
        return ""

    def record(self) -> dict[str, Any]:
        """The stage in a picture's metadata."""
        given = {"guidance": self.guidance, "cfg": self.cfg}
        known = {name: value for name, value in given.items() if value is not None}
        return {
            "model": self.model,
            "pipeline": self.kind,
            "steps": self.steps,
            "evaluations": self.evaluations,
            **known,
        }


@dataclass(frozen=True, slots=True)
class PipelineRefinement(PipelineStage):
    """A second stage that a pipeline of diffusers draws from pictures."""

    strength: float = 0.5
    strength_as: StrengthMeaning = "comfyui"

    @property
    def schedule(self) -> int:
        """The number of steps for diffusers, of which it takes the share ``strength``.

        As ComfyUI counts, it is so large that ``steps`` are taken.
        """
        return self.steps if self.strength_as == "diffusers" else int(self.steps / self.strength)

    @property
    def evaluations(self) -> int:
        """Count the steps that diffusers takes of its schedule."""
        return min(int(self.schedule * self.strength), self.schedule)

    def record(self) -> dict[str, Any]:
        """The stage in a picture's metadata."""
        return PipelineStage.record(self) | {"strength": self.strength, "strength_as": self.strength_as}


@dataclass(frozen=True, slots=True)
class Refinement(Stage):
    """A second stage: it adds noise up to ``strength``, then denoises again."""

    steps: int = 4
    strength: float = 0.15
    strength_as: StrengthMeaning = "comfyui"

    def levels(self) -> tuple[float, ...]:
        return refinement_levels(self.steps, self.shift, self.strength, self.strength_as, self.scheduler)

    def record(self) -> dict[str, Any]:
        """The stage in a picture's metadata."""
        return Stage.record(self) | {"strength": self.strength, "strength_as": self.strength_as}


@dataclass(frozen=True, slots=True)
class Enlargement:
    """A third stage: an upscaler that makes pictures ``scale`` times as wide and as high.

    ``architecture`` is spandrel's name of it, ``fingerprint`` that of its file.
    """

    model: str
    architecture: str
    scale: int
    fingerprint: str

    def enlarged(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (width, height) of an enlarged picture of ``size``."""
        return self.scale * size[0], self.scale * size[1]

    def record(self, size: tuple[int, int]) -> dict[str, Any]:
        """The stage in the metadata of a picture of ``size`` before it."""
        return {
            "model": self.model,
            "architecture": self.architecture,
            "scale": self.scale,
            "size": list(self.enlarged(size)),
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True, slots=True)
class PictureRequest:
    """A request for pictures of shots, in a first stage and refinements.

    Each shot is made by ``first`` (or from ``start``, one picture for all), then by each of ``refinements``. ``start`` is uint8 [height,
    width, 3]. ``handoff`` says how latents reach a second stage: as they are, or decoded by the first model's VAE, rounded to 8 bits and
    encoded by ``refiner_parts``' own, which another family needs. ``fingerprints`` are those of the files of all stages, by their names in metadata.
    """

    shots: tuple[Shot, ...]
    size: tuple[int, int]
    first: Stage | PipelineStage | None = None
    refinements: tuple[Refinement | PipelineRefinement, ...] = ()
    start: Pictures | None = None
    handoff: Handoff = "latent"
    refiner_parts: Components | PipelineFolder | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises UsageError for a request that makes nothing, or takes its pictures from two places."""
        if (self.first is None) == (self.start is None):
            raise UsageError("a picture starts from `base` or from `init_image`, not from both; leave one out.")
        if self.first is None and not self.refinements:
            raise UsageError("`init_image` is the start of a second stage: name its model with `refiner`.")
        if not self.shots:
            raise UsageError("the request has no prompt; give one, or a file of prompts with `prompts`.")

    @property
    def stages(self) -> tuple[Stage | PipelineStage, ...]:
        return (*((self.first,) if self.first else ()), *self.refinements)

    @property
    def evaluations(self) -> int:
        """Count the transformers' evaluations, guidance counted once."""
        return len(self.shots) * sum(stage.evaluations for stage in self.stages)

    @property
    def last(self) -> int:
        """The number of pictures of each shot that are a last stage's."""
        return len(self.refinements) or 1

    @property
    def many(self) -> bool:
        """Whether more than one picture comes of it."""
        return len(self.shots) * self.last > 1
