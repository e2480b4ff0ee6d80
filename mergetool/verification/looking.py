"""From what a user asks of ``verify`` to what is looked at, with the defaults of the model in hand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mergetool import models
from mergetool.errors import InputMissing, MergetoolError
from mergetool.lab import world
from mergetool.sampler import session, settings
from mergetool.sampler.session import Request
from mergetool.sampler.studio import Refinement, Shot, Stage, Studio

PROMPTS = (
    "a knight in ornate blue and gold armor standing in a cathedral",
    "a bowl of oranges on a wooden table by a window, morning light",
    "a portrait of an old fisherman with a grey beard and a yellow raincoat",
    "a street in the rain at night, neon signs reflected on the asphalt",
)
"""For models whose prompts can be anything."""

EMBEDDED_PROMPTS = 36


class NotLookedAt(MergetoolError):
    """There will be no pictures; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for; None or "" is the model's own or a default."""

    steps: int = 30
    guidance: float = 3.0
    shift: float | None = None
    refiner: str | None = None
    strength: str = "0.15"
    strength_as: str = "comfyui"
    refine_steps: int = 4
    prompts: Path | None = None
    seeds: str = "0"
    size: str | None = None
    pipeline: str | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Look:
    """How every model is looked at: the same shots, the same first stage, and the second ones after it."""

    shots: tuple[Shot, ...]
    size: tuple[int, int]
    first: Stage
    refinements: tuple[Refinement, ...] = ()

    def request(self, model: str) -> Request:
        """The look at ``model``."""
        return Request(self.shots, self.size, dataclasses.replace(self.first, model=model), self.refinements)


def plan(output: str, parent: str, wish: Wish, *, patient: bool) -> tuple[Studio, Look]:
    """The parts and the look for a merge whose first model is ``parent``.

    Unless ``patient``, raises NotLookedAt for a merge that cannot be sampled with what is here, or only in hours: a
    large one without a GPU. Raises UsageError and InputMissing as the sampler's settings do.
    """
    try:
        studio = settings.studio(
            output,
            pipeline=wish.pipeline,
            text_encoder=wish.text_encoder,
            tokenizer=wish.tokenizer,
            vae=wish.vae,
            device=wish.device,
        )
    except InputMissing as error:
        if patient or wish.pipeline or wish.text_encoder or wish.tokenizer or wish.vae:
            raise
        raise NotLookedAt(str(error)) from None
    if not patient and studio.device == "cpu" and settings.is_large(output):
        raise NotLookedAt("there is no GPU, and a model of this size takes hours without one; --images takes them.")
    shift = wish.shift or settings.own_shift(parent)
    first = settings.stage(output, wish.steps, wish.guidance, shift, ())
    refiner = wish.refiner or ("lab.turbo" if embedded(studio) else None)
    second: tuple[Refinement, ...] = ()
    if refiner:
        second = settings.refinements(
            refiner, wish.refine_steps, 0.0, None, (), wish.strength, strength_as=wish.strength_as
        )
    prompts = _default_prompts(studio) if wish.prompts is None else session.read_prompts(wish.prompts)
    shots = settings.shots(prompts, settings.seeds(wish.seeds), "", None, None)
    return studio, Look(shots, settings.picture_size(wish.size, None, studio), first, second)


def embedded(studio: Studio) -> bool:
    """Whether the parts are those of the embedded family, whose prompts have an exact checker."""
    return models.EMBEDDED in studio.components.vae.parents


def _default_prompts(studio: Studio) -> tuple[str, ...]:
    """Some of the closed world for the embedded family, a few of general use otherwise."""
    if not embedded(studio):
        return PROMPTS
    chosen = np.random.default_rng(0).permutation(len(world.SCENES))[:EMBEDDED_PROMPTS]
    return tuple(world.SCENES[i].prompt for i in chosen)
