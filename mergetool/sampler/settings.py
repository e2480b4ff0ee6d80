"""From what a user writes to a request of the sampler, with presets and the defaults of the models asked for.

All that can be told from text, headers and configs is told here, before torch or a library of models is imported.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mergetool import models
from mergetool.errors import UsageError
from mergetool.sampler import parts
from mergetool.sampler.inputs import read_picture
from mergetool.sampler.parts import Components, WeightedLora, pipeline_folder
from mergetool.sampler.request import HANDOFFS, SAMPLERS, SEEDS, Refinement, Request, SamplerName, Shot, Stage
from mergetool.sampler.schedule import MEANINGS, MOST_STEPS, SCHEDULERS, Scheduler

T = TypeVar("T")

MODEL_SHIFT = 3.0
"""Of a model without a scheduler beside it: what ComfyUI takes for every Z-Image."""

LARGE = 1e9
"""Bytes of weights from which a model is run in BF16 by default."""

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Preset:
    """Settings of a stage that belong together; ``cfg`` as ComfyUI counts it, ``shift`` None for the model's own."""

    steps: int
    cfg: float
    shift: float | None = None
    sampler: SamplerName = "euler"
    scheduler: Scheduler = "simple"
    strength: str = "0.15"


FIRST = Preset(steps=30, cfg=4.0)
SECOND = Preset(steps=4, cfg=1.0)

PRESETS = {
    "comfyui-base": Preset(25, 4.0, 3.0, "res_multistep", "simple"),
    "comfyui-turbo": Preset(8, 1.0, 3.0, "res_multistep", "simple"),
    "comfyui-refine": Preset(5, 1.0, 3.0, "dpmpp_2m_sde", "beta", "0.33"),
}
"""What ComfyUI's stock templates of Z-Image are set to: image_z_image, image_z_image_turbo, utility_z_image_turbo_2k_upscaler."""


@dataclass(frozen=True, slots=True)
class StageOptions:
    """What a user says of a stage; None is the preset's, else the default. ``strength`` is one number or several with commas."""

    model: str | None = None
    preset: str | None = None
    steps: int | None = None
    guidance: float | None = None
    cfg: float | None = None
    shift: float | None = None
    sampler: str | None = None
    scheduler: str | None = None
    loras: tuple[WeightedLora, ...] = ()
    strength: str | None = None
    strength_as: str | None = None

    def given(self) -> Iterator[str]:
        """The names of the options that say something, the model aside."""
        return (name for name in self.__slots__ if name != "model" and getattr(self, name) not in (None, ()))


@dataclass(frozen=True, slots=True)
class PartsOptions:
    """Where the parts beside the transformer are, as a user says it."""

    pipeline: str | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae: Path | None = None

    def find(self, model: str) -> Components:
        """Raises InputMissing, as `Components.find`."""
        return Components.find(
            model, pipeline=self.pipeline, text_encoder=self.text_encoder, tokenizer=self.tokenizer, vae=self.vae
        )


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """All that a user says of one call of ``sample``; None is what is left out."""

    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] | None = None
    negative: str | None = None
    first: StageOptions = field(default_factory=StageOptions)
    second: StageOptions = field(default_factory=StageOptions)
    refine_prompt: str | None = None
    refine_seed: int | None = None
    init_image: Path | None = None
    handoff: str | None = None
    size: str | None = None
    parts: PartsOptions = field(default_factory=PartsOptions)
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with everything that it needs; ``notes`` are sentences on what was said and has no effect here."""

    request: Request
    components: Components
    device: str
    dtype: str
    notes: tuple[str, ...]


def prepare(asked: SampleOptions) -> Prepared:
    """What `studio.Studio.of` and `session.make` take, with every file that is named looked at.

    Raises UsageError for what cannot be meant, InputMissing for what is not there, DataError and FamilyError for a model, LoRA,
    text encoder, VAE or picture that cannot be used together.
    """
    model = asked.first.model or asked.second.model
    if not model:
        raise UsageError("there is no model: name one with --base, or with --init-image and --refiner.")
    device, dtype = choice("--device", asked.device, DEVICES), choice("--dtype", asked.dtype, DTYPES)
    handoff = choice("--handoff", asked.handoff or "latent", HANDOFFS)
    pipeline = asked.parts.pipeline
    first = None if asked.first.model is None else stage(asked.first, pipeline=pipeline)
    second = () if asked.second.model is None else refinements(asked.second, pipeline=None if first else pipeline)
    shots = tuple(
        Shot(prompt, require_seed(seed), asked.negative or "", asked.refine_prompt, asked.refine_seed)
        for prompt in asked.prompts
        for seed in asked.seeds or (0,)
    )
    if asked.refine_seed is not None:
        require_seed(asked.refine_seed)
    start, notes = (None, []) if asked.init_image is None else read_picture(asked.init_image)
    components = asked.parts.find(model)
    size = picture_size(asked.size, None if start is None else (start.shape[1], start.shape[0]), components)
    other = asked.second.model if handoff == "pixels" and first else None
    second_parts = None if other is None else PartsOptions().find(other)
    request = Request(shots, size, first, second, start, handoff, second_parts)
    check(request, components)
    if dtype == "auto":
        dtype = "bf16" if is_large(model) else "fp32"
    return Prepared(request, components, device, dtype, (*notes, *without_effect(asked, request)))


def check(request: Request, components: Components) -> None:
    """Look at the headers of every model, LoRA, text encoder and VAE. Raises what `parts` raises for those that do not fit."""
    components.check()
    second = request.refiner_parts or components
    if second is not components:
        second.check()
    if request.first is not None:
        parts.check_model(request.first.model, request.first.loras, components, request.size)
    for refinement in request.refinements[:1]:  # they differ in strength only
        parts.check_model(refinement.model, refinement.loras, second, request.size)


def stage(asked: StageOptions, *, pipeline: str | None = None) -> Stage:
    """A first stage. Raises UsageError for numbers that cannot be meant."""
    made = Stage(*_settings(asked, FIRST, pipeline, ""))
    made.levels()
    return made


def refinements(asked: StageOptions, *, pipeline: str | None = None) -> tuple[Refinement, ...]:
    """One second stage for each strength, those of one level once. Raises UsageError."""
    meaning = choice("--strength-as", asked.strength_as or "comfyui", MEANINGS)
    default = SECOND if meaning == "comfyui" else Preset(SECOND.steps, SECOND.cfg, scheduler="diffusers")
    settings = _settings(asked, default, pipeline, "refine-")
    strengths = asked.strength if asked.strength is not None else _preset(asked, default).strength
    made = tuple(Refinement(*settings, _strength(text, strengths), meaning) for text in strengths.split(","))
    for refinement in made:
        refinement.levels()
    return made


def _settings(
    asked: StageOptions, default: Preset, pipeline: str | None, prefix: str
) -> tuple[str, int, float, float, tuple[WeightedLora, ...], SamplerName, Scheduler]:
    assert asked.model is not None
    preset = _preset(asked, default)
    shift = asked.shift if asked.shift is not None else preset.shift
    if shift is not None and not 0 < shift < 1e6:
        raise UsageError(f"--{prefix}shift is a positive number, not {shift:g}.")
    if asked.steps is not None and not 1 <= asked.steps <= MOST_STEPS:
        raise UsageError(f"--{prefix}steps is 1 to {MOST_STEPS}, not {asked.steps}.")
    return (
        asked.model,
        preset.steps if asked.steps is None else asked.steps,
        _guidance(asked, preset, prefix),
        own_shift(asked.model, pipeline) if shift is None else shift,
        asked.loras,
        choice(f"--{prefix}sampler", asked.sampler or preset.sampler, SAMPLERS),
        choice(f"--{prefix}scheduler", asked.scheduler or preset.scheduler, SCHEDULERS),
    )


def _preset(asked: StageOptions, default: Preset) -> Preset:
    return default if asked.preset is None else PRESETS[choice("a preset", asked.preset, tuple(PRESETS))]


def _guidance(asked: StageOptions, preset: Preset, prefix: str) -> float:
    """Guidance as diffusers counts it; below 0 it can only come from a cfg below 1, which ComfyUI has and diffusers has not."""
    if asked.guidance is not None and asked.cfg is not None:
        raise UsageError(f"--{prefix}guidance and --{prefix}cfg are two ways to say one thing: give one of them.")
    cfg = preset.cfg if asked.cfg is None else asked.cfg
    if not math.isfinite(cfg) or abs(cfg) >= 1e4:
        raise UsageError(f"--{prefix}cfg is a number, 1 for no guidance, not {cfg:g}.")
    if asked.guidance is None:
        return cfg - 1.0
    if not 0 <= asked.guidance < 1e4:
        raise UsageError(
            f"--{prefix}guidance is 0 (none) or more, not {asked.guidance:g}; "
            f"a mix with the negative, as ComfyUI has it, is a --{prefix}cfg below 1."
        )
    return asked.guidance


def _strength(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UsageError(
            f'--strength "{whole}" is no number or list of numbers; write 0.15 or 0.1,0.15,0.25.'
        ) from None


def own_shift(model: str, pipeline: str | None = None) -> float:
    """The shift of a model: that of the scheduler in its pipeline folder, else of ``pipeline``'s, else MODEL_SHIFT."""
    for place in (model, pipeline):
        folder = None if place is None else pipeline_folder(models.resolve(place).path)
        path = None if folder is None else folder / "scheduler" / "scheduler_config.json"
        if path is not None and path.is_file():
            found = json.loads(path.read_text("utf-8")).get("shift")
            if isinstance(found, int | float):
                return float(found)
    return MODEL_SHIFT


def choice(option: str, value: str, known: Sequence[T]) -> T:
    """``value`` when it is one of ``known``; raises UsageError, listing them, when it is not."""
    for one in known:
        if one == value:
            return one
    raise UsageError(f'{option} is one of {", ".join(map(str, known))}, not "{value}".')


def require_seed(seed: int) -> int:
    """Raises UsageError for a number that is no seed."""
    if not 0 <= seed < SEEDS:
        raise UsageError(f"a seed is a whole number from 0 to {SEEDS - 1}, not {seed}.")
    return seed


def seeds(text: str) -> tuple[int, ...]:
    """``1,2,3`` or ``1-8`` or both. Raises UsageError."""
    found: list[int] = []
    for piece in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,20})(?:-(\d{1,20}))?\s*", piece)
        if match is None or int(match[2] or match[1]) - int(match[1]) not in range(10_000):
            raise UsageError(f'--seeds "{text}" is no list of seeds; write 1,2,3 or 1-8.')
        found.extend(map(require_seed, range(int(match[1]), int(match[2] or match[1]) + 1)))
    return tuple(found)


def is_large(model: str) -> bool:
    """Whether a model's weights are more than LARGE."""
    with models.open_model(model) as opened:
        return sum(part.nbytes for part in opened.anatomy.parts.values()) > LARGE


def picture_size(text: str | None, start: tuple[int, int] | None, components: Components) -> tuple[int, int]:
    """(width, height): as written, or the init image's, or what the VAE was made for. Raises UsageError."""
    if text is None:
        side = components.vae_config.sample_size
        asked, option = start or (side, side), "--init-image"
    else:
        match = re.fullmatch(r"\s*(\d{1,5})\s*[xX×*]\s*(\d{1,5})\s*", text)
        if match is None:
            raise UsageError(f'--size "{text}" is not WIDTHxHEIGHT; write for example 1024x768.')
        asked, option = (int(match[1]), int(match[2])), "--size"
        if start is not None and asked != start:
            raise UsageError(
                f"--init-image is {start[0]}x{start[1]}, and so is what becomes of it; leave --size out, or scale the picture first."
            )
    unit = 2 * components.vae_config.reduction
    if any(side < unit or side % unit for side in asked):
        nearest = [max(unit, round(side / unit) * unit) for side in asked]
        raise UsageError(
            f"{option} is {asked[0]}x{asked[1]}, and both sides must be multiples of {unit} for this model: "
            f"{'crop or scale it to' if option == '--init-image' else 'the nearest is'} {nearest[0]}x{nearest[1]}."
        )
    return asked


def without_effect(asked: SampleOptions, request: Request) -> Iterator[str]:
    """A sentence on every option that was given and changes nothing in this request."""
    if request.first is None:
        yield from _unused("", asked.first.given(), "there is no --base")
        if asked.seeds is not None and asked.refine_seed is not None and len(asked.seeds) == 1:
            yield "--seed has no effect: there is no --base, and --refine-seed is given."
    if not request.refinements:
        yield from _unused("refine-", asked.second.given(), "there is no --refiner")
        others = {"refine-prompt": asked.refine_prompt, "refine-seed": asked.refine_seed}
        yield from _unused("", (name for name, value in others.items() if value is not None), "there is no --refiner")
    if asked.handoff is not None and not (request.first and request.refinements):
        yield "--handoff has no effect: there is one stage."
    if asked.negative and all(stage.guidance == 0 for stage in request.stages):
        yield "--negative has no effect: no stage has guidance (cfg is 1)."
    places = asked.parts
    if places.pipeline and places.text_encoder and places.tokenizer and places.vae and _brings_shift(asked):
        yield "--pipeline has no effect: text encoder, tokenizer and VAE are named, and the shift is known."
    for stage in request.stages:
        for lora in stage.loras:
            if lora.strength == 0:
                yield f"the LoRA {lora.path.name} has no effect: its strength is 0."


def _brings_shift(asked: SampleOptions) -> bool:
    """Whether no stage takes its shift from ``--pipeline``."""
    named = [stage for stage in (asked.first, asked.second) if stage.model and stage.shift is None]
    return all(
        stage.model and own_shift(stage.model) == own_shift(stage.model, asked.parts.pipeline) for stage in named
    )


def _unused(prefix: str, names: Iterator[str], why: str) -> Iterator[str]:
    for name in names:
        bare = name in ("strength", "strength_as", "refine-prompt", "refine-seed")
        option = name if bare else f"{prefix}{'lora' if name == 'loras' else name}"
        yield f"--{option.replace('_', '-')} has no effect: {why}."
