"""The options of the sampler: two stages, the parts beside them, prompts, seeds and sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, cast

from mergetool.errors import UsageError
from mergetool.options.kinds import Choice, DeviceName, File, Integer, Kind, Loras, ModelName, Number, String
from mergetool.options.running import RUN
from mergetool.options.sampling import (
    FIRST,
    HANDOFFS,
    MEANINGS,
    MOST_STEPS,
    PRECISIONS,
    PRESETS,
    SAMPLERS,
    SCHEDULERS,
    SECOND,
    SEEDS,
    Handoff,
    Precision,
    SamplerName,
    Scheduler,
    StrengthMeaning,
)
from mergetool.options.table import Option, Section, Table

MOST_SEEDS = 10_000
"""The seeds of one range, ``1-8``."""

# --- kinds -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Guidance(Number):
    """Guidance as diffusers counts it, from 0. Smaller scales are a matter of ``cfg``."""

    least: float = 0
    most: float = 1e4
    cfg: str = "cfg"

    def value(self, given: Any) -> float:
        try:
            return super().value(given)
        except ValueError:
            raise ValueError(
                f"0 (none) or more; a mix with the negative, as ComfyUI has it, is a `{self.cfg}` below 1"
            ) from None


@dataclass(frozen=True, eq=False, repr=False)
class Texts(Kind):
    """One text or a list of them."""

    metavar: str = "TEXT"

    def value(self, given: Any) -> tuple[str, ...]:
        texts = (given,) if isinstance(given, str) else tuple(given)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("a text or a list of texts")
        return texts


@dataclass(frozen=True, eq=False, repr=False)
class Seeds(Kind):
    """One seed, a list of them, or as text ``1,2,3``, ``1-8`` or both."""

    metavar: str = "LIST"

    def value(self, given: Any) -> tuple[int, ...]:
        if isinstance(given, str):
            seeds = [seed for piece in given.split(",") for seed in self._range(piece)]
        else:
            seeds = [given] if isinstance(given, int) else list(given)
        if not seeds or not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
            raise ValueError("a seed or a list of seeds")
        if not all(0 <= seed < SEEDS for seed in seeds):
            raise ValueError(f"a seed, or several as in 1,2,3 or 1-8, from 0 to {SEEDS - 1}")
        return tuple(seeds)

    def _range(self, piece: str) -> range:
        match = re.fullmatch(r"\s*(\d{1,20})(?:-(\d{1,20}))?\s*", piece, re.ASCII)
        if match is None or int(match[2] or match[1]) - int(match[1]) not in range(MOST_SEEDS):
            raise ValueError(f"a seed, or several as in 1,2,3 or 1-8, at most {MOST_SEEDS} in a range")
        return range(int(match[1]), int(match[2] or match[1]) + 1)


@dataclass(frozen=True, eq=False, repr=False)
class Sides(Kind):
    """Width and height of a picture, or as text ``1024x768``."""

    metavar: str = "WIDTHxHEIGHT"

    def value(self, given: Any) -> tuple[int, int]:
        if isinstance(given, str):
            match = re.fullmatch(r"\s*(\d{1,5})\s*[xX×*]\s*(\d{1,5})\s*", given, re.ASCII)
            sides = () if match is None else (int(match[1]), int(match[2]))
        else:
            sides = tuple(given) if isinstance(given, Sequence) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and 0 <= side < 100_000 for side in sides):
            raise ValueError("WIDTHxHEIGHT, as in 1024x768")
        return sides


@dataclass(frozen=True, eq=False, repr=False)
class Strengths(Kind):
    """One strength, a list of them, or as text ``0.1,0.15``: each above 0 and at most 1."""

    metavar: str = "STRENGTH"

    def value(self, given: Any) -> tuple[float, ...]:
        several = given.split(",") if isinstance(given, str) else given if isinstance(given, Sequence) else [given]
        if isinstance(given, str) and re.search(r"\b0,\d", given.replace(" ", "")):
            written = re.sub(r"\b0,(\d+)", r"0.\1", given.replace(" ", ""))
            raise ValueError(f"written with a point: {written}")
        strengths, one_strength = [], Number(above=0, most=1)
        for strength in several:
            try:
                strengths.append(
                    one_strength.read(strength) if isinstance(strength, str) else one_strength.value(strength)
                )
            except ValueError:
                raise ValueError("a number above 0 and at most 1, or several as in 0.1,0.15,0.25") from None
        if not strengths:
            raise ValueError("one number or more")
        return tuple(strengths)


def _steps(of: str, section: Section, default: int) -> Option:
    of_all = f"{default}, of other families their own"
    return Option(help=f"Number of steps of {of}.", section=section, kind=Integer(1, MOST_STEPS), default=of_all)


_CFG = Number(-1e4, 1e4)
_SHIFT = Number(above=0, most=1e6)
_PRESET = Choice(tuple(PRESETS), "NAME")
_SAMPLER = Choice(SAMPLERS, "NAME")
_SCHEDULER = Choice(SCHEDULERS, "NAME")


# --- rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskedStage:
    """The options that were given for one stage.

    None stands for the preset's value, else for the default; ``prefix`` stands before the names of its options.
    """

    prefix: str
    model: str | None
    preset: str | None
    steps: int | None
    guidance: float | None
    cfg: float | None
    shift: float | None
    sampler: SamplerName | None
    scheduler: Scheduler | None
    strength: tuple[float, ...] | None = None
    strength_as: StrengthMeaning | None = None
    loras: tuple[tuple[str, Fraction], ...] = ()

    def given(self) -> Iterator[str]:
        """The names of the options that say something, the model aside."""
        for name in ("preset", "steps", "guidance", "cfg", "shift", "sampler", "scheduler", "loras"):
            if getattr(self, name) not in (None, ()):
                yield f"{self.prefix}{name}"
        yield from (name for name in ("strength", "strength_as") if getattr(self, name) is not None)


@dataclass(frozen=True, kw_only=True)
class FirstStageOptions(Table):
    """The options for sampling the first stage."""

    preset: Annotated[
        str | None,
        Option(help="Start from the settings of this template of ComfyUI.", section="First stage", kind=_PRESET),
    ] = None
    steps: Annotated[int | None, _steps("the first stage", "First stage", FIRST.steps)] = None
    guidance: Annotated[
        float | None,
        Option(
            help="Guidance scale as diffusers counts it, one less than cfg.",
            section="First stage",
            kind=Guidance(),
            default="3",
        ),
    ] = None
    cfg: Annotated[
        float | None, Option(help="Guidance scale as ComfyUI counts it.", section="First stage", kind=_CFG, default="4")
    ] = None
    shift: Annotated[
        float | None,
        Option(
            help="Shift of the noise schedule.",
            section="First stage",
            kind=_SHIFT,
            default="that of the model, else of `pipeline`, else 3",
        ),
    ] = None
    sampler: Annotated[
        SamplerName | None,
        Option(help="Sampler of the first stage.", section="First stage", kind=_SAMPLER, default=FIRST.sampler),
    ] = None
    scheduler: Annotated[
        Scheduler | None,
        Option(
            help="Noise schedule of the first stage.", section="First stage", kind=_SCHEDULER, default=FIRST.scheduler
        ),
    ] = None

    def check(self) -> None:
        """Raises UsageError for guidance that is given twice."""
        super().check()
        _refuse_both("guidance", self.guidance, "cfg", self.cfg)


@dataclass(frozen=True, kw_only=True)
class SecondStageOptions(Table):
    """The options for the model that refines, and how it does."""

    refiner: Annotated[
        str | None, Option(help="Refine the pictures with this model.", section="Second stage", kind=ModelName())
    ] = None
    strength: Annotated[
        float | Sequence[float] | str | None,
        Option(
            help="Denoising strength of the second stage, 0 to 1; a list such as 0.1,0.15 compares several.",
            section="Second stage",
            kind=Strengths(),
            default="0.15",
        ),
    ] = None
    strength_as: Annotated[
        StrengthMeaning | None,
        Option(
            help="Count strength as this program does.",
            section="Second stage",
            kind=Choice(MEANINGS),
            default="comfyui",
        ),
    ] = None
    refine_preset: Annotated[
        str | None,
        Option(
            help="Start the second stage from the settings of this template of ComfyUI.",
            section="Second stage",
            kind=_PRESET,
        ),
    ] = None
    refine_steps: Annotated[int | None, _steps("the second stage", "Second stage", SECOND.steps)] = None
    refine_guidance: Annotated[
        float | None,
        Option(
            help="Guidance scale of the second stage as diffusers counts it.",
            section="Second stage",
            kind=Guidance(cfg="refine_cfg"),
            default="0",
        ),
    ] = None
    refine_cfg: Annotated[
        float | None,
        Option(
            help="Guidance scale of the second stage as ComfyUI counts it.",
            section="Second stage",
            kind=_CFG,
            default="1",
        ),
    ] = None
    refine_shift: Annotated[
        float | None,
        Option(
            help="Shift of the second stage's noise schedule.",
            section="Second stage",
            kind=_SHIFT,
            default="that of the model, else 3",
        ),
    ] = None
    refine_sampler: Annotated[
        SamplerName | None,
        Option(help="Sampler of the second stage.", section="Second stage", kind=_SAMPLER, default=SECOND.sampler),
    ] = None
    refine_scheduler: Annotated[
        Scheduler | None,
        Option(
            help="Noise schedule of the second stage.",
            section="Second stage",
            kind=_SCHEDULER,
            default="simple; diffusers with `strength_as=diffusers`",
        ),
    ] = None

    def check(self) -> None:
        """Raises UsageError for guidance that is given twice."""
        super().check()
        _refuse_both("refine_guidance", self.refine_guidance, "refine_cfg", self.refine_cfg)


@dataclass(frozen=True, kw_only=True)
class PartsOptions(Table):
    """The options for where the parts beside the transformer are."""

    pipeline: Annotated[
        str | None,
        Option(
            help="Take text encoder, tokenizer and VAE from this pipeline folder.",
            section="Text encoder and VAE",
            kind=ModelName(stored=True),
        ),
    ] = None
    text_encoder: Annotated[
        Path | str | None,
        Option(help="File or folder of the text encoder.", section="Text encoder and VAE", kind=File()),
    ] = None
    tokenizer: Annotated[
        Path | str | None,
        Option(
            help="Folder of the tokenizer.", section="Text encoder and VAE", kind=File(), default="in it or beside it"
        ),
    ] = None
    vae: Annotated[
        Path | str | None, Option(help="File or folder of the VAE.", section="Text encoder and VAE", kind=File())
    ] = None

    @property
    def files(self) -> tuple[Path | None, Path | None, Path | None]:
        """Text encoder, tokenizer and VAE in their one form."""
        return cast("tuple[Path | None, Path | None, Path | None]", (self.text_encoder, self.tokenizer, self.vae))


@dataclass(frozen=True, kw_only=True)
class PicturesOptions(FirstStageOptions, SecondStageOptions, PartsOptions):
    """The options that every look at a model's pictures takes."""

    prompts: Annotated[
        Path | str | None, Option(help="Read the prompts from this file, one a line.", section="Pictures", kind=File())
    ] = None
    seeds: Annotated[
        int | Sequence[int] | str | None,
        Option(
            help="Draw every prompt with each of these seeds, e.g. 1,2,3 or 1-8.",
            section="Pictures",
            kind=Seeds(),
            also="seed",
            default="0",
        ),
    ] = None
    negative: Annotated[
        str | None,
        Option(help="Negative prompt; has no effect at cfg 1.", section="Pictures", kind=String(empty=True)),
    ] = None
    size: Annotated[
        tuple[int, int] | str | None,
        Option(
            help="Width and height of the pictures in pixels, e.g. 1024x768.",
            section="Pictures",
            kind=Sides(),
            default="the model's",
        ),
    ] = None
    device: Annotated[
        str,
        Option(
            help="Compute on this device: auto, cpu, cuda or cuda:NUMBER.",
            section="Machine",
            kind=DeviceName(),
            missing=RUN,
        ),
    ] = "auto"

    @property
    def seed_numbers(self) -> tuple[int, ...]:
        """``seeds`` in their one form, the default where none is given."""
        return cast("tuple[int, ...]", self.seeds) or (0,)

    @property
    def pixels(self) -> tuple[int, int] | None:
        """``size`` in its one form."""
        return cast("tuple[int, int] | None", self.size)

    @property
    def prompts_file(self) -> Path | None:
        """``prompts`` in their one form."""
        return cast("Path | None", self.prompts)

    @property
    def first(self) -> AskedStage:
        """The options of the first stage, without a model."""
        return AskedStage(
            "",
            None,
            self.preset,
            self.steps,
            self.guidance,
            self.cfg,
            self.shift,
            self.sampler,
            self.scheduler,
        )

    @property
    def second(self) -> AskedStage:
        """The options of the second stage."""
        return AskedStage(
            "refine_",
            self.refiner,
            self.refine_preset,
            self.refine_steps,
            self.refine_guidance,
            self.refine_cfg,
            self.refine_shift,
            self.refine_sampler,
            self.refine_scheduler,
            cast("tuple[float, ...] | None", self.strength),
            self.strength_as,
        )


@dataclass(frozen=True, kw_only=True)
class HandOffOptions(Table):
    """The options that only pictures of two stages have."""

    refine_loras: Annotated[
        Mapping[str, float] | Sequence[str | tuple[str, Fraction]],
        Option(
            help="Add this LoRA to the second stage's model.", section="Second stage", kind=Loras(), flag="refine-lora"
        ),
    ] = ()
    refine_prompt: Annotated[
        str | None,
        Option(
            help="Prompt of the second stage.",
            section="Second stage",
            kind=String(empty=True),
            default="the first stage's",
        ),
    ] = None
    refine_seed: Annotated[
        int | None,
        Option(
            help="Seed of the second stage.",
            section="Second stage",
            kind=Integer(0, SEEDS - 1),
            default="the first stage's seed + 1",
        ),
    ] = None
    init_image: Annotated[
        Path | str | None,
        Option(
            help="Start the second stage from this picture, without a first stage.", section="Second stage", kind=File()
        ),
    ] = None
    handoff: Annotated[
        Handoff | None,
        Option(
            help="Pass the picture to the second stage as latents or as pixels, which models with different VAEs need.",
            section="Second stage",
            kind=Choice(HANDOFFS),
            default="latent",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class EnlargingOptions(Table):
    """The option for a third stage, which only pictures for people have."""

    upscale: Annotated[
        Path | str | None,
        Option(
            help="Enlarge the pictures with this upscaler: ESRGAN, SwinIR, DAT and all others that spandrel loads.",
            section="Third stage",
            kind=File(),
        ),
    ] = None

    @property
    def upscaler(self) -> Path | None:
        """``upscale`` in its one form."""
        return cast("Path | None", self.upscale)


@dataclass(frozen=True)
class SampleOptions(PicturesOptions, HandOffOptions, EnlargingOptions):
    """Pictures of prompts, by one model or by two in a row."""

    prompt: Annotated[str | Sequence[str] | None, Option(help="The prompt.", kind=Texts("PROMPT"), argument=True)] = (
        None
    )
    _: KW_ONLY
    base: Annotated[
        str | None, Option(help="Draw the pictures with this model.", section="First stage", kind=ModelName())
    ] = None
    loras: Annotated[
        Mapping[str, float] | Sequence[str | tuple[str, Fraction]],
        Option(
            help="Add this LoRA to the first stage's model, e.g. style.safetensors:0.8.",
            section="First stage",
            kind=Loras(),
            flag="lora",
        ),
    ] = ()
    dtype: Annotated[
        Precision,
        Option(
            help="Compute in this dtype; auto takes fp32 for small models and bf16 for large ones.",
            section="Machine",
            kind=Choice(PRECISIONS),
        ),
    ] = "auto"

    def check(self) -> None:
        """Raises UsageError for prompts from two places."""
        super().check()
        _refuse_both("prompt", self.prompt, "prompts", self.prompts)

    @property
    def first(self) -> AskedStage:
        """The options of the first stage."""
        return replace(super().first, model=self.base, loras=cast("tuple[tuple[str, Fraction], ...]", self.loras))

    @property
    def second(self) -> AskedStage:
        """The options of the second stage."""
        return replace(super().second, loras=cast("tuple[tuple[str, Fraction], ...]", self.refine_loras))

    @property
    def texts(self) -> tuple[str, ...]:
        """``prompt`` in its one form."""
        return cast("tuple[str, ...]", self.prompt or ())

    @property
    def start(self) -> Path | None:
        """``init_image`` in its one form."""
        return cast("Path | None", self.init_image)


def _refuse_both(one: str, first: object, other: str, second: object) -> None:
    if first is not None and second is not None:
        raise UsageError(f"`{one}` and `{other}` set the same thing; give one of them.")
