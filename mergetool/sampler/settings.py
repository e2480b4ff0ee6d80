"""Turn a user's options into a request of the sampler, with presets and models' defaults.

All that can be told from text, headers and configs is told here, before torch or a library of models is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from mergetool.adapters.lora_file import open_lora
from mergetool.checkpoint.paths import typed
from mergetool.checkpoint.stamp import display_names
from mergetool.engine.inputs import Inputs
from mergetool.engine.inputs import opened as opened_model
from mergetool.errors import InputMissing, UsageError
from mergetool.options.pictures import AskedStage, PartsOptions, PicturesOptions, SampleOptions
from mergetool.options.sampling import (
    ACROSS,
    FIRST,
    MODEL_SHIFT,
    MOST_STEPS,
    PRESETS,
    SECOND,
    WITHIN,
    Handoff,
    SamplerName,
    Scheduler,
    StagePreset,
)
from mergetool.sampler import parts
from mergetool.sampler.inputs import read_picture, read_prompts
from mergetool.sampler.parts import Components, WeightedLora, json_object, pipeline_of
from mergetool.sampler.pipeline_folder import PipelineFolder
from mergetool.sampler.request import (
    Enlargement,
    PictureRequest,
    PipelineRefinement,
    PipelineStage,
    Refinement,
    Shot,
    Stage,
)

LARGE = 1e9
"""Bytes of weights from which a model is run in BF16 by default."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request, ready to run; ``notes`` are sentences on options without effect.

    ``upscale`` is the file of a third stage, ``enlargement`` the stage once the file is open.
    """

    request: PictureRequest
    parts: Components | PipelineFolder
    device: str
    dtype: str
    notes: tuple[str, ...]
    upscale: Path | None = None
    enlargement: Enlargement | None = None


def prepare(asked: SampleOptions) -> Prepared:
    """Prepare a request of pictures, and look at every file that it names.

    The result is what `session.opened` and `session.make` take.

    Raises UsageError for what cannot be meant, InputMissing for what is not there, DataError and FamilyError for a model, LoRA,
    text encoder, VAE, pipeline or picture that cannot be used together.
    """
    model = asked.base or asked.refiner
    if not model:
        raise UsageError("the request names no model; name one with `base`, or with `init_image` and `refiner`.")
    drawers = Assignment(asked.first, asked.second, asked, asked.handoff)
    first = None if asked.base is None else drawers.first_stage()
    second = drawers.second_stages()
    shots = tuple(
        Shot(prompt, seed, asked.negative or "", asked.refine_prompt, asked.refine_seed)
        for prompt in (asked.texts if asked.prompts_file is None else read_prompts(asked.prompts_file))
        for seed in asked.seed_numbers
    )
    start, notes = (None, []) if asked.start is None else read_picture(asked.start)
    parts_of_first = drawers.parts()
    size = picture_size(asked.pixels, None if start is None else (start.shape[1], start.shape[0]), parts_of_first)
    request = PictureRequest(shots, size, first, second, start, drawers.handoff, drawers.second_parts())
    check(request, parts_of_first)
    request = replace(request, fingerprints=fingerprints(request))
    dtype = ("bf16" if is_large(model) else "fp32") if asked.dtype == "auto" else asked.dtype
    ignored = (*notes, *drawers.notes(), *without_effect(asked, request, asked.base))
    if asked.upscaler is not None and not asked.upscaler.is_file():
        raise InputMissing(f'"{asked.upscaler}" is no file; check the path of `upscale`.')
    return Prepared(request, parts_of_first, asked.device, dtype, ignored, asked.upscaler)


class Assignment:
    """The drawer of each stage of a sample: Z-Image's studio, or a pipeline of diffusers.

    ``pipeline`` names the parts of the first stage's model, or of the only one's.
    """

    def __init__(
        self, first: AskedStage, second: AskedStage, places: PartsOptions, handoff: Handoff | None = None
    ) -> None:
        self.first, self.second, self.places = first, second, places
        self.base = None if first.model is None else PipelineFolder.of(first.model, places.pipeline)
        self.pipeline = places.pipeline if first.model is None else None
        self.refiner = None if second.model is None else PipelineFolder.of(second.model, self.pipeline)
        self.two_stages = first.model is not None and second.model is not None
        self.across = self.two_stages and (self.base and self.base.stem) != (self.refiner and self.refiner.stem)
        """Whether two families draw."""
        for folder, asked in ((self.base, first), (self.refiner, second)):
            if folder is not None and asked.loras:
                raise UsageError(
                    f"`{asked.prefix}loras` is for Z-Image models; write the LoRA into the model, as in "
                    "\"tuned + 0.8*lora('style.safetensors')\", and name this folder with `pipeline`."
                )
        if self.base is not None and self.base.needs_pictures:
            raise UsageError(
                f'{self.base.kind} in "{self.base.path}" draws from pictures alone; name it with `refiner`.'
            )
        meet = not self.two_stages or self._share_latents()
        if handoff == "latent" and not meet:
            raise UsageError(
                "`handoff=latent` is for two models of one family with one VAE, and these have others: leave it out."
            )
        self.handoff: Handoff = handoff or ("latent" if meet else "pixels")
        """The form in which a first stage's result reaches the second."""

    def _share_latents(self) -> bool:
        if self.base is None or self.refiner is None:
            return self.base is self.refiner  # both None: two Z-Image models, which share the first's VAE
        return self.base.shares_latents(self.refiner)

    def first_stage(self, like: str | None = None) -> Stage | PipelineStage:
        """The first stage. Raises UsageError for a schedule that is too long.

        ``like`` is a MODEL whose shift stands for its own, which a merge does not say.
        """
        asked, folder = self.first, self.base
        if folder is None:
            return stage(replace(asked, model=like or asked.model), pipeline=self.places.pipeline)
        return PipelineStage(*_pipeline_settings(asked, folder, MOST_STEPS))

    def second_stages(self) -> tuple[Refinement | PipelineRefinement, ...]:
        """One second stage for each strength."""
        asked, folder = self.second, self.refiner
        if asked.model is None:
            return ()
        if folder is None:
            return refinements(asked, pipeline=self.pipeline, default=ACROSS if self.across else None)
        default = ACROSS if self.across or not self.two_stages else WITHIN
        given = _pipeline_settings(asked, folder, default.steps)
        return tuple(
            PipelineRefinement(*given, strength, asked.strength_as or "comfyui")
            for strength in asked.strength or (default.strength,)
        )

    def parts(self) -> Components | PipelineFolder:
        """The parts that draw the first stage, or the only one."""
        model = self.first.model or self.second.model
        assert model is not None
        return (self.base if self.first.model else self.refiner) or components_of(model, self.places)

    def second_parts(self) -> Components | PipelineFolder | None:
        """The parts that draw the second stage, where they are others than the first's."""
        if self.second.model is None or not self.two_stages:
            return None
        if self.refiner is not None or self.handoff == "latent":
            return self.refiner
        text_encoder, tokenizer, vae = self.places.files if self.base is not None else (None, None, None)
        return Components.find(self.second.model, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)

    def notes(self) -> Iterator[str]:
        """Notes on choices of diffusers' pipeline itself, and on defaults across families."""
        for folder, asked in ((self.base, self.first), (self.refiner, self.second)):
            ignored = {f"{asked.prefix}{name}" for name in ("preset", "shift", "sampler", "scheduler")}
            if folder is not None:
                yield from _unused((name for name in asked.given() if name in ignored), f"{folder.kind} brings its own")
            if folder is not None and folder.defaults.guidance == "none" and asked.guidance is not None:
                yield f"`{asked.prefix}guidance` has no effect: this model takes none."
        second = self.second
        if self.across and second.strength is None and second.preset is None:
            yield (
                f"the second stage is at strength {ACROSS.strength:g}, which is usual across families (0.4 to 0.6, with 8 to 12 steps)."
            )


def components_of(model: str, asked: PartsOptions) -> Components:
    """The parts beside a MODEL's transformer. Raises InputMissing, as `Components.find`."""
    text_encoder, tokenizer, vae = asked.files
    return Components.find(model, pipeline=asked.pipeline, text_encoder=text_encoder, tokenizer=tokenizer, vae=vae)


def check(request: PictureRequest, first: Components | PipelineFolder) -> None:
    """Look at the headers of every model, LoRA, text encoder and VAE. Raises what `parts` raises for those that do not fit."""
    first.check()
    second = request.refiner_parts or first
    if second is not first:
        second.check()
        _require_units(request.size, second, "size")
    if isinstance(request.first, Stage) and isinstance(first, Components):
        parts.check_model(request.first.model, request.first.loras, first, request.size)
    for refinement in request.refinements[:1]:  # they differ in strength only
        if isinstance(refinement, Refinement) and isinstance(second, Components):
            parts.check_model(refinement.model, refinement.loras, second, request.size)


def stage(asked: AskedStage, *, pipeline: str | None = None) -> Stage:
    """A first stage."""
    made = Stage(*_settings(asked, FIRST, pipeline))
    made.levels()
    return made


def refinements(
    asked: AskedStage, *, pipeline: str | None = None, default: StagePreset | None = None
) -> tuple[Refinement, ...]:
    """One second stage for each strength. Raises UsageError for one that makes too long a schedule."""
    meaning = asked.strength_as or "comfyui"
    default = default or SECOND
    default = default if meaning == "comfyui" else replace(default, scheduler="diffusers")
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


def _pipeline_settings(
    asked: AskedStage, folder: PipelineFolder, most: int
) -> tuple[str, str, int, float | None, float | None, str, bool]:
    """The user's settings, else the family's, of which it takes ``most`` steps at most."""
    assert asked.model is not None
    defaults = folder.defaults
    guidance, cfg = asked.guidance, asked.cfg
    if guidance is None and cfg is None and defaults.guidance == "cfg":
        cfg = defaults.scale
    elif guidance is None and cfg is None:
        guidance = defaults.scale
    steps = asked.steps or min(defaults.steps, most)
    return asked.model, folder.kind, steps, guidance, cfg, folder.shift, defaults.guidance != "none"


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
            shift = json_object(path).get("shift")
            if isinstance(shift, int | float):
                return float(shift)
    return MODEL_SHIFT


def fingerprints(request: PictureRequest) -> dict[str, str]:
    """The fingerprints of the files of all models and LoRAs, by their names in metadata."""
    with ExitStack() as stack:
        inputs = Inputs(stack)
        found = inputs.fingerprints([inputs.model(name) for name in {stage.model: stage for stage in request.stages}])
        loras = {lora.path for stage in request.stages if isinstance(stage, Stage) for lora in stage.loras}
        for path in sorted(loras):
            found[str(path)] = stack.enter_context(open_lora(path)).checkpoint.fingerprint()
    names = display_names(list(found))
    return {names[name]: fingerprint for name, fingerprint in found.items()}


def is_large(model: str) -> bool:
    """Whether a model's weights are more than LARGE."""
    with opened_model(model, fingerprints=False) as opened:
        return sum(part.nbytes for part in opened.anatomy.own.values()) > LARGE


def picture_size(
    asked: tuple[int, int] | None, start: tuple[int, int] | None, drawn_by: Components | PipelineFolder
) -> tuple[int, int]:
    """The (width, height) of pictures: the user's, or the init image's, or the model's own. Raises UsageError."""
    side = drawn_by.picture_side
    size, option = (asked, "size") if asked else (start or (side, side), "init_image")
    if start is not None and size != start:
        raise UsageError(
            f"`init_image` is {start[0]}x{start[1]}, and its result has the same size; leave `size` out, or scale the picture first."
        )
    _require_units(size, drawn_by, option)
    return size


def _require_units(size: tuple[int, int], drawn_by: Components | PipelineFolder, option: str) -> None:
    unit = drawn_by.picture_unit
    if any(side < unit or side % unit for side in size):
        nearest = [max(unit, round(side / unit) * unit) for side in size]
        raise UsageError(
            f"`{option}` is {size[0]}x{size[1]}, and both sides must be multiples of {unit} for this model: "
            f"{'crop or scale it to' if option == 'init_image' else 'the nearest is'} {nearest[0]}x{nearest[1]}."
        )


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
    if asked.negative and all(isinstance(stage, Stage) and stage.guidance == 0 for stage in request.stages):
        yield "`negative` has no effect: no stage has guidance (cfg is 1)."
    if asked.pipeline and all(asked.files) and _brings_shift(asked, base):
        yield "`pipeline` has no effect: text encoder, tokenizer and VAE are named, and the shift is known."
    for stage in request.stages:
        for lora in stage.loras if isinstance(stage, Stage) else ():
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
