"""Turn the options of ``verify`` into shots and stages, with the model's defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mergetool import models
from mergetool.engine import device as devices
from mergetool.errors import InputMissing, MergetoolError
from mergetool.lab import world
from mergetool.options.pictures import PartsOptions, PicturesOptions
from mergetool.options.table import part
from mergetool.sampler import settings
from mergetool.sampler.inputs import read_prompts
from mergetool.sampler.request import PictureRequest, Refinement, Shot, Stage
from mergetool.sampler.studio import Studio, dtype_of

PROMPTS = (
    "a knight in ornate blue and gold armor standing in a cathedral",
    "a bowl of oranges on a wooden table by a window, morning light",
    "a portrait of an old fisherman with a grey beard and a yellow raincoat",
    "a street in the rain at night, neon signs reflected on the asphalt",
)
"""Prompts for models without a world of their own."""

EMBEDDED_PROMPTS = 36


class NotLookedAt(MergetoolError):
    """There will be no pictures; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Look:
    """The shots and stages for every model.

    All have the same shots and the same first stage, and the second ones after it. ``notes`` are sentences on what was asked for and has no
    effect.
    """

    shots: tuple[Shot, ...]
    size: tuple[int, int]
    first: Stage
    refinements: tuple[Refinement, ...] = ()
    notes: tuple[str, ...] = ()

    def request(self, model: str) -> PictureRequest:
        """The look at ``model``."""
        return PictureRequest(self.shots, self.size, replace(self.first, model=model), self.refinements)


def plan(output: str, parent: str, asked: PicturesOptions, *, patient: bool) -> tuple[Studio, Look]:
    """The parts and the look for a merge whose first model is ``parent``.

    Unless ``patient``, raises NotLookedAt for a merge that cannot be sampled with what is here, or only in hours: a
    large one without a GPU. Raises UsageError and InputMissing as the sampler's settings do.
    """
    try:
        components = settings.components_of(output, asked)
    except InputMissing as error:
        if patient or part(PartsOptions, asked) != PartsOptions():
            raise
        raise NotLookedAt(str(error)) from None
    device = devices.torch_device(asked.device)
    large = settings.is_large(output)
    if not patient and device == "cpu" and large:
        raise NotLookedAt("there is no GPU, and a model of this size takes hours without one; `images` takes them.")
    studio = Studio(components, device, dtype_of("bf16" if large else "fp32"))
    first = settings.stage(replace(asked.first, model=parent), pipeline=asked.pipeline)
    refiner = asked.refiner or ("lab.turbo" if embedded(studio) else None)
    second = settings.refinements(replace(asked.second, model=refiner)) if refiner else ()
    prompts = _default_prompts(studio) if asked.prompts_file is None else read_prompts(asked.prompts_file)
    shots = tuple(Shot(prompt, seed, asked.negative or "") for prompt in prompts for seed in asked.seed_numbers)
    size = settings.picture_size(asked.pixels, None, components)
    look = Look(shots, size, replace(first, model=output), second)
    request = look.request(output)
    settings.check(request, components)
    return studio, replace(look, notes=tuple(settings.without_effect(asked, request, None)))


def embedded(studio: Studio) -> bool:
    """Whether the parts are the embedded family's, whose prompts have an exact checker."""
    return models.EMBEDDED in studio.components.vae.parents


def _default_prompts(studio: Studio) -> tuple[str, ...]:
    """Some of the closed world for the embedded family, a few of general use otherwise."""
    if not embedded(studio):
        return PROMPTS
    chosen = np.random.default_rng(0).permutation(len(world.SCENES))[:EMBEDDED_PROMPTS]
    return tuple(world.SCENES[i].prompt for i in chosen)
