"""Turn a user's options into a request of the sampler, with presets and models' defaults.

All that can be told from text, headers and configs is told here, before torch or a library of models is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from mergetool.checkpoint.paths import typed
from mergetool.engine.inputs import opened as opened_model
from mergetool.errors import UsageError
from mergetool.options.pictures import AskedStage, PartsOptions, PicturesOptions, SampleOptions
from mergetool.options.sampling import FIRST, MODEL_SHIFT, PRESETS, SECOND, SamplerName, Scheduler, StagePreset
from mergetool.sampler import parts
from mergetool.sampler.inputs import read_picture, read_prompts
from mergetool.sampler.parts import Components, WeightedLora, pipeline_of
from mergetool.sampler.request import PictureRequest, Refinement, Shot, Stage

LARGE = 1e9
"""Bytes of weights from which a model is run in BF16 by default."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, ready to run; ``notes`` are sentences on options without effect."""

    request: PictureRequest
    components: Components
    device: str
    dtype: str
    notes: tuple[str, ...]


def prepare(asked: SampleOptions) -> Prepared:
    """Prepare a request of pictures, and look at every file that it names.

    The result is what `studio.Studio.of` and `session.make` take.

    Raises UsageError for what cannot be meant, InputMissing for what is not there, DataError and FamilyError for a model, LoRA,
    text encoder, VAE or picture that cannot be used together.
    """
    model = asked.base or asked.refiner
    if not model:
        raise UsageError("there is no model: name one with `base`, or with `init_image` and `refiner`.")
    handoff, pipeline = asked.handoff or "latent", asked.pipeline
    first = None if asked.base is None else stage(asked.first, pipeline=pipeline)
    second = () if asked.refiner is None else refinements(asked.second, pipeline=None if first else pipeline)
    shots = tuple(
        Shot(prompt, seed, asked.negative or "", asked.refine_prompt, asked.refine_seed)
        for prompt in (asked.texts if asked.prompts_file is None else read_prompts(asked.prompts_file))
        for seed in asked.seed_numbers
    )
    start, notes = (None, []) if asked.start is None else read_picture(asked.start)
    components = components_of(model, asked)
    size = picture_size(asked.pixels, None if start is None else (start.shape[1], start.shape[0]), components)
    other = asked.refiner if handoff == "pixels" and first else None
    second_parts = None if other is None else Components.find(other)
    request = PictureRequest(shots, size, first, second, start, handoff, second_parts)
    check(request, components)
    dtype = ("bf16" if is_large(model) else "fp32") if asked.dtype == "auto" else asked.dtype
    return Prepared(request, components, asked.device, dtype, (*notes, *without_effect(asked, request, asked.base)))


def components_of(model: str, asked: PartsOptions) -> Components:
    """The parts beside a MODEL's transformer. Raises InputMissing, as `Components.find`."""
    text_encoder, tokenizer, vae = asked.files
    return Components.find(model, pipeline=asked.pipeline, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)


def check(request: PictureRequest, components: Components) -> None:
    """Look at the headers of every model, LoRA, text encoder and VAE. Raises what `parts` raises for those that do not fit."""
    components.check()
    second = request.refiner_parts or components
    if second is not components:
        second.check()
    if request.first is not None:
        parts.check_model(request.first.model, request.first.loras, components, request.size)
    for refinement in request.refinements[:1]:  # they differ in strength only
        parts.check_model(refinement.model, refinement.loras, second, request.size)


def stage(asked: AskedStage, *, pipeline: str | None = None) -> Stage:
    """A first stage."""
    made = Stage(*_settings(asked, FIRST, pipeline))
    made.levels()
    return made


def refinements(asked: AskedStage, *, pipeline: str | None = None) -> tuple[Refinement, ...]:
    """One second stage for each strength. Raises UsageError for one that makes too long a schedule."""
    meaning = asked.strength_as or "comfyui"
    default = SECOND if meaning == "comfyui" else StagePreset(SECOND.steps, SECOND.cfg, scheduler="diffusers")
    settings = _settings(asked, default, pipeline)
    strengths = asked.strength or (_preset(asked, default).strength,)
    made = tuple(Refinement(*settings, strength, meaning) for strength in strengths)
    for refinement in made:
        refinement.levels()
    return made


def _settings(
    asked: AskedStage, default: StagePreset, pipeline: str | None
) -> tuple[str, int, float, float, tuple[WeightedLora, ...], SamplerName, Scheduler]:
    assert asked.model is not None
    preset = _preset(asked, default)
    shift = asked.shift if asked.shift is not None else preset.shift
    cfg = preset.cfg if asked.cfg is None else asked.cfg
    return (
        asked.model,
        asked.steps or preset.steps,
        # Guidance as diffusers counts it; below 0 it can only come from a cfg below 1, which ComfyUI has and diffusers has not.
        cfg - 1.0 if asked.guidance is None else asked.guidance,
        own_shift(asked.model, pipeline) if shift is None else shift,
        tuple(_lora(*lora) for lora in asked.loras),
        asked.sampler or preset.sampler,
        asked.scheduler or preset.scheduler,
    )


def _preset(asked: AskedStage, default: StagePreset) -> StagePreset:
    return default if asked.preset is None else PRESETS[asked.preset]


def _lora(path: str, strength: Fraction) -> WeightedLora:
    return WeightedLora(Path(typed(path)), float(strength))


def own_shift(model: str, pipeline: str | None = None) -> float:
    """The shift of a model: from its own pipeline folder, from ``pipeline``, else MODEL_SHIFT.

    In a folder it is the scheduler's.
    """
    for place in (model, pipeline):
        folder = None if place is None else pipeline_of(place)
        path = None if folder is None else folder / "scheduler" / "scheduler_config.json"
        if path is not None and path.is_file():
            shift = json.loads(path.read_text("utf-8")).get("shift")
            if isinstance(shift, int | float):
                return float(shift)
    return MODEL_SHIFT


def is_large(model: str) -> bool:
    """Whether a model's weights are more than LARGE."""
    with opened_model(model, fingerprints=False) as opened:
        return sum(part.nbytes for part in opened.anatomy.parts.values()) > LARGE


def picture_size(
    asked: tuple[int, int] | None, start: tuple[int, int] | None, components: Components
) -> tuple[int, int]:
    """The (width, height) of pictures: the user's, or the init image's, or the VAE's own. Raises UsageError."""
    side = components.vae_config.sample_size
    size, option = (asked, "size") if asked else (start or (side, side), "init_image")
    if start is not None and size != start:
        raise UsageError(
            f"`init_image` is {start[0]}x{start[1]}, and so is what becomes of it; leave `size` out, or scale the picture first."
        )
    unit = 2 * components.vae_config.reduction
    if any(side < unit or side % unit for side in size):
        nearest = [max(unit, round(side / unit) * unit) for side in size]
        raise UsageError(
            f"`{option}` is {size[0]}x{size[1]}, and both sides must be multiples of {unit} for this model: "
            f"{'crop or scale it to' if option == 'init_image' else 'the nearest is'} {nearest[0]}x{nearest[1]}."
        )
    return size


def without_effect(asked: PicturesOptions, request: PictureRequest, base: str | None) -> Iterator[str]:
    """Name every option that was given and changes nothing in this request.

    Its first model is ``base``.
    """
    refine = {name: getattr(asked, name, None) for name in ("refine_prompt", "refine_seed", "handoff")}
    if request.first is None:
        yield from _unused(asked.first.given(), "there is no `base`")
        if asked.seeds is not None and refine["refine_seed"] is not None and len(asked.seed_numbers) == 1:
            yield "`seeds` has no effect: there is no `base`, and `refine_seed` is given."
    if not request.refinements:
        yield from _unused(asked.second.given(), "there is no `refiner`")
        others = (name for name in ("refine_prompt", "refine_seed") if refine[name] is not None)
        yield from _unused(others, "there is no `refiner`")
    if refine["handoff"] is not None and not (request.first and request.refinements):
        yield "`handoff` has no effect: there is one stage."
    if asked.negative and all(stage.guidance == 0 for stage in request.stages):
        yield "`negative` has no effect: no stage has guidance (cfg is 1)."
    if asked.pipeline and all(asked.files) and _brings_shift(asked, base):
        yield "`pipeline` has no effect: text encoder, tokenizer and VAE are named, and the shift is known."
    for stage in request.stages:
        for lora in stage.loras:
            if lora.strength == 0:
                yield f"the LoRA {lora.path.name} has no effect: its strength is 0."


def _brings_shift(asked: PicturesOptions, base: str | None) -> bool:
    """Whether no stage takes its shift from ``pipeline``."""
    named = [(base, asked.shift), (asked.refiner, asked.refine_shift)]
    return all(
        own_shift(model) == own_shift(model, asked.pipeline) for model, shift in named if model and shift is None
    )


def _unused(names: Iterator[str], why: str) -> Iterator[str]:
    for name in names:
        yield f"`{name}` has no effect: {why}."
