"""Turn the options of ``verify`` into shots and stages, with the model's defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mergetool import models
from mergetool.engine import device as devices
from mergetool.errors import InputMissing, MergetoolError
from mergetool.lab import world
from mergetool.options.pictures import PartsOptions, PicturesOptions
from mergetool.options.sampling import Handoff
from mergetool.options.table import part
from mergetool.sampler import session, settings
from mergetool.sampler.inputs import read_prompts
from mergetool.sampler.parts import Components
from mergetool.sampler.pipeline_folder import PipelineFolder
from mergetool.sampler.request import PictureRequest, PipelineRefinement, PipelineStage, Refinement, Shot, Stage
from mergetool.sampler.session import Drawer
from mergetool.sampler.studio import dtype_of

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

    All have the same shots and the same first stage, and the second ones after it, which ``refiner_parts`` draw where it is not the first
    stage's parts. ``notes`` are sentences on what was asked for and has no effect, and on what is not judged.
    """

    shots: tuple[Shot, ...]
    size: tuple[int, int]
    first: Stage | PipelineStage
    refinements: tuple[Refinement | PipelineRefinement, ...] = ()
    notes: tuple[str, ...] = ()
    handoff: Handoff = "latent"
    refiner_parts: Components | PipelineFolder | None = None

    def request(self, model: str) -> PictureRequest:
        """The look at ``model``."""
        first = replace(self.first, model=model)
        return PictureRequest(
            self.shots,
            self.size,
            first,
            self.refinements,
            handoff=self.handoff,
            refiner_parts=self.refiner_parts,
        )


def plan(output: str, parent: str, asked: PicturesOptions, *, patient: bool) -> tuple[Drawer, Look]:
    """The parts and the look for a merge whose first model is ``parent``.

    The parts beside the transformer are the output's for all models. Unless ``patient``, raises NotLookedAt for a merge that cannot be sampled
    with what is here, or only in hours: a large one without a GPU. Raises UsageError and InputMissing as the sampler's settings do.
    """
    first = replace(asked.first, model=output)
    drawers = settings.Assignment(first, asked.second, asked)
    try:
        drawn_by = drawers.parts()
    except InputMissing as error:
        if patient or part(PartsOptions, asked) != PartsOptions():
            raise
        raise NotLookedAt(str(error)) from None
    device = devices.torch_device(asked.device)
    large = settings.is_large(output)
    if not patient and device == "cpu" and large:
        raise NotLookedAt("there is no GPU, and a model of this size takes hours without one; `images` takes them.")
    if asked.refiner is None and embedded(drawn_by):
        drawers = settings.Assignment(first, replace(asked.second, model="lab.turbo"), asked)
    studio = session.drawer(drawn_by, device, dtype_of("bf16" if large else "fp32"), [])
    prompts = _default_prompts(drawn_by) if asked.prompts_file is None else read_prompts(asked.prompts_file)
    look = Look(
        tuple(Shot(prompt, seed, asked.negative or "") for prompt in prompts for seed in asked.seed_numbers),
        settings.picture_size(asked.pixels, None, drawn_by),
        replace(drawers.first_stage(like=parent), model=output),
        drawers.second_stages(),
        handoff=drawers.handoff,
        refiner_parts=drawers.second_parts(),
    )
    request = look.request(output)
    settings.check(request, drawn_by)
    notes = [*drawers.notes(), *settings.without_effect(asked, request, None)]
    if not look.refinements:
        notes.append("drift is not judged: there is no second stage; `refiner` names its model.")
    return studio, replace(look, notes=tuple(notes))


def embedded(drawn_by: Components | PipelineFolder) -> bool:
    """Whether the parts are the embedded family's, whose prompts have an exact checker."""
    return isinstance(drawn_by, Components) and models.EMBEDDED in drawn_by.vae.parents


def _default_prompts(drawn_by: Components | PipelineFolder) -> tuple[str, ...]:
    """Some of the closed world for the embedded family, a few of general use otherwise."""
    if not embedded(drawn_by):
        return PROMPTS
    chosen = np.random.default_rng(0).permutation(len(world.SCENES))[:EMBEDDED_PROMPTS]
    return tuple(world.SCENES[i].prompt for i in chosen)
