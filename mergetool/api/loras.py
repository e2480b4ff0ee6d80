"""LoRAs made of others, and what is in one: `lora_resize`, `lora_merge`, `lora_orthogonal`, `lora_common`, `lora_convert`, and more."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from mergetool.api.calling import called
from mergetool.api.events import Events, Request
from mergetool.errors import UsageError
from mergetool.options.combining import (
    KEY_FORMATS,
    GroupOptions,
    KeyFormat,
    LookUpOptions,
    SumOptions,
    SumRunOptions,
)
from mergetool.options.kinds import Choice, File, Flag, Loras, Model, Models, Number, Output, Strength
from mergetool.options.running import DRY, ThreadOptions, UnmatchedOptions, WriteOptions, require_output
from mergetool.options.table import Option

if TYPE_CHECKING:
    from mergetool.adapters import LoraFile
    from mergetool.adapters.describe import Contents
    from mergetool.adapters.dora_in_comfyui import Difference
    from mergetool.adapters.loaders import Loading
    from mergetool.arch import Anatomy
    from mergetool.checkpoint.outputs import Target
    from mergetool.lora.combine import Combined, Derive
    from mergetool.lora.convert import Converted
    from mergetool.lora.gathering import Gathering
    from mergetool.lora.operations import Score
    from mergetool.lora.verify import LoraReport

ALora = Annotated[
    str | os.PathLike[str],
    Option(help="A LoRA in any spelling: a file or a PEFT folder.", kind=Model("LORA"), argument=True),
]
Written = Annotated[
    str | os.PathLike[str] | None, Option(help="FILE.safetensors.", kind=Output(), short="-o", default=DRY)
]


@dataclass(frozen=True)
class LoraResize(Request, SumOptions, SumRunOptions):
    """A LoRA at a smaller rank."""

    lora: ALora
    output: Written = None

    def check(self) -> None:
        """Raises UsageError where nothing says how much to keep."""
        super().check()
        if self.keeps_all and not self.dry_run:
            raise UsageError("say how much to keep: `rank=N`, `rank_thresh=T`, `rule=knee` or `budget=SIZE`.")


@dataclass(frozen=True)
class LoraMerge(Request, SumOptions, GroupOptions, SumRunOptions):
    """LoRAs added up to one."""

    loras: Annotated[
        Mapping[str, float] | Sequence[str | tuple[str, Fraction]],
        Option(help="LoRAs, each with its strength.", kind=Loras(), argument=True),
    ]
    output: Written = None


@dataclass(frozen=True)
class LoraOrthogonal(Request, SumOptions, SumRunOptions):
    """The part of one LoRA that is orthogonal to another."""

    first: Annotated[
        str | os.PathLike[str], Option(help="The LoRA to take the part of.", kind=Model("A"), argument=True)
    ]
    second: Annotated[
        str | os.PathLike[str], Option(help="The LoRA to be orthogonal to.", kind=Model("B"), argument=True)
    ]
    output: Written = None


@dataclass(frozen=True)
class LoraCommon(Request, SumOptions, SumRunOptions):
    """What two LoRAs have in common."""

    first: Annotated[str | os.PathLike[str], Option(help="One LoRA.", kind=Model("A"), argument=True)]
    second: Annotated[str | os.PathLike[str], Option(help="Another.", kind=Model("B"), argument=True)]
    output: Written = None


@dataclass(frozen=True)
class LoraConvert(Request, LookUpOptions, UnmatchedOptions, WriteOptions):
    """A LoRA under the names of another program."""

    lora: ALora
    output: Annotated[
        str | os.PathLike[str] | None,
        Option(help="FILE.safetensors; a folder for peft.", kind=Output(), short="-o", default=DRY),
    ] = None
    key_format: Annotated[KeyFormat, Option(help="Whose names.", kind=Choice(KEY_FORMATS, "FORMAT"))] = "default"


@dataclass(frozen=True)
class LoraInterference(Request, ThreadOptions, UnmatchedOptions):
    """How much LoRAs, or models' differences to a base, act on the same thing."""

    loras: Annotated[
        Sequence[str], Option(help="Two or more, every pair of which is scored.", kind=Models("LORA"), argument=True)
    ]
    base: Annotated[
        str | None,
        Option(help="The model that they are differences to; they may be checkpoints then.", kind=Model()),
    ] = None
    signs: Annotated[bool, Option(help="Also how many elements pull in opposite directions.", kind=Flag())] = False

    def check(self) -> None:
        """Raises UsageError for fewer than two."""
        super().check()
        if len(self.loras) < 2:
            raise UsageError("give at least two LoRAs to compare.")


@dataclass(frozen=True)
class LoraVerify(Request, ThreadOptions):
    """Whether base + LoRA makes the tuned model."""

    base: Annotated[str, Option(help="The model that the LoRA is for.", kind=Model("BASE"), argument=True)]
    lora: ALora
    variant: Annotated[str, Option(help="The model that base + LoRA should be.", kind=Model("VARIANT"), argument=True)]
    max_residual: Annotated[
        float | None, Option(help="Largest overall residual after rounding, as in 0.1.", kind=Number(0))
    ] = None
    strength: Annotated[
        float | str | Fraction, Option(help="Strength of the LoRA; any finite number.", kind=Strength())
    ] = 1


@dataclass(frozen=True)
class LoraInspect(Request, LookUpOptions):
    """What a LoRA holds, and who loads it."""

    lora: ALora
    plot: Annotated[
        str | os.PathLike[str] | None,
        Option(help="Draw the norms of all blocks as a heat map.", kind=File("FILE.png")),
    ] = None
    overwrite: Annotated[bool, Option(help="Replace an existing picture.", kind=Flag())] = False


@dataclass(frozen=True, slots=True)
class SumPlan:
    """A LoRA that is going to be made of others: what each module adds up to, and the word for what is done."""

    command: str
    gathering: Gathering


@dataclass(frozen=True)
class Summed:
    """A LoRA that was made of others and written to ``output`` in ``seconds``, or with ``dry_run`` would be; ``combined`` is None then.

    ``loading`` says which releases load it whole, ``warnings`` what a user of the files that were read should know.
    """

    output: Path | None
    warnings: Sequence[str]
    combined: Combined | None = None
    loading: Sequence[Loading] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class LoraConverted:
    """A LoRA that was written to ``output`` in ``seconds``, or with ``dry_run`` would be, and what had to be rounded or left out."""

    output: Path | None
    dialect: str
    converted: Converted
    loading: Sequence[Loading]
    seconds: float
    dry_run: bool


@dataclass(frozen=True)
class PairScores:
    """How much two LoRAs, or differences, act on the same thing, matrix by matrix; ``left_out`` are names with the reason."""

    first: str
    second: str
    scores: Sequence[Score]
    left_out: Sequence[tuple[str, str]]
    warnings: Sequence[str]


@dataclass(frozen=True)
class LoraVerified:
    """What a LoRA leaves of the difference between two models, and how much was read in ``seconds``."""

    report: LoraReport
    bytes_read: int
    seconds: float
    max_residual: float | None

    @property
    def residual(self) -> float:
        """The overall residual after rounding."""
        return self.report.total(after=True)

    @property
    def passed(self) -> bool:
        """Whether the residual is as small as it has to be."""
        return self.max_residual is None or self.residual <= self.max_residual


@dataclass(frozen=True)
class LoraContents:
    """What a LoRA holds, who loads it, and how far ComfyUI's formula of a DoRA leads from training's, where a model is given for that."""

    contents: Contents
    loading: Sequence[Loading]
    in_comfyui: Difference | None


def run_lora_resize(asked: LoraResize, events: Events) -> Summed:
    """Make a LoRA smaller: to a rank, to a share of its energy, or to a file's size. Raises MergetoolError."""
    return _sum("resize", [(str(asked.lora), Fraction(1))], asked, events)


def run_lora_merge(asked: LoraMerge, events: Events) -> Summed:
    """Add LoRAs up to one, exactly or at a smaller rank. Raises MergetoolError."""
    return _sum("merge", cast("Sequence[tuple[str, Fraction]]", asked.loras), asked, events)


def run_lora_orthogonal(asked: LoraOrthogonal, events: Events) -> Summed:
    """Take the part of one LoRA that is orthogonal to another, in every module by itself. Raises MergetoolError."""
    from mergetool.lora import operations

    return _sum("orthogonal", _both(asked), asked, events, prepare=operations.orthogonal)


def run_lora_common(asked: LoraCommon, events: Events) -> Summed:
    """Take what two LoRAs have in common: the directions that both write to and both read. Raises MergetoolError."""
    from mergetool.lora import operations

    return _sum("common", _both(asked), asked, events, prepare=operations.both, derive=operations.common)


def _both(asked: LoraOrthogonal | LoraCommon) -> list[tuple[str, Fraction]]:
    return [(str(asked.first), Fraction(1)), (str(asked.second), Fraction(1))]


def _sum(
    command: str,
    loras: Sequence[tuple[str, Fraction]],
    asked: LoraResize | LoraMerge | LoraOrthogonal | LoraCommon,
    events: Events,
    *,
    prepare: Callable[[Gathering], Gathering] = lambda gathering: gathering,
    derive: Callable[[Gathering], Derive] | None = None,
) -> Summed:
    """Read, combine and write: the only place where that is done. ``prepare`` changes the pieces, ``derive`` what is made of them."""
    from mergetool.adapters.loaders import loading_of
    from mergetool.lora import memory
    from mergetool.lora.combine import combine
    from mergetool.lora.gathering import gather, opened
    from mergetool.lora.selection import Budget, selected

    target, started = _target(asked.output, events, dry_run=asked.dry_run), time.monotonic()
    selection, anatomy = selected(asked), _anatomy(asked.model)
    settings = asked.settings if isinstance(asked, LoraMerge) else ()
    with opened(loras, anatomy=anatomy) as terms:
        gathering = prepare(
            gather(terms, multipliers=settings, skip_unmatched=asked.skip_unmatched, names_known=anatomy is not None)
        )
        plan = SumPlan(command, gathering)
        events.plan(plan, memory.of_sum(gathering, selection, asked.stored, asked.threads))
        summed = Summed(None if target is None else target.path, gathering.warnings)
        if asked.dry_run or target is None:
            return summed
        passes = 2 if isinstance(selection, Budget) else 1
        with events.progress(command[:7], passes * len(gathering.modules), " modules", publishes=True) as advance:
            combined = combine(
                gathering,
                target,
                selection,
                dtype=asked.stored,
                command=command,
                derive=derive(gathering) if derive else None,
                overwrite=asked.overwrite,
                threads=asked.threads,
                progress=advance,
            )
        loading = loading_of(target.path, gathering.family)
        summed = replace(summed, combined=combined, loading=loading, seconds=time.monotonic() - started)
        events.done(plan, summed)
        return summed


def run_lora_convert(asked: LoraConvert, events: Events) -> LoraConverted:
    """Write a LoRA under the names of another program, losslessly where that is possible. Raises MergetoolError."""
    from mergetool.adapters.loaders import loading_of
    from mergetool.lora import memory
    from mergetool.lora.convert import convert

    target = _target(asked.output, events, dry_run=asked.dry_run, folder=asked.key_format == "peft")
    started = time.monotonic()
    with _opened(asked) as file:
        events.plan(file, memory.of_conversion(file))
        with events.progress("convert", 1, "file", publishes=True) as advance:
            advance(1)
            done = convert(
                file,
                None if asked.dry_run else target,
                asked.key_format,
                overwrite=asked.overwrite,
                skip_unmatched=asked.skip_unmatched,
                names_known=asked.model is not None,
            )
        path = None if target is None else target.path
        loading = [] if asked.dry_run or path is None else loading_of(path, file.family)
        converted = LoraConverted(path, file.dialect, done, loading, time.monotonic() - started, asked.dry_run)
        events.done(file, converted)
        return converted


def run_lora_interference(asked: LoraInterference, events: Events) -> list[PairScores]:
    """Score how much LoRAs, or models' differences to a base, act on the same thing, pair by pair. Raises MergetoolError."""
    found = []
    for first, second in combinations(asked.loras, 2):
        of = _of_loras if asked.base is None else _of_differences
        found.append(of(first, second, asked, events))
        events.done(asked, found[-1])
    return found


def _of_loras(first: str, second: str, asked: LoraInterference, events: Events) -> PairScores:
    from mergetool.lora.gathering import gather, opened
    from mergetool.lora.operations import scores

    with opened([(first, Fraction(1)), (second, Fraction(1))]) as terms:
        gathering = gather(terms, skip_unmatched=asked.skip_unmatched)
        with events.progress("score", len(gathering.modules), " modules") as advance:
            found = list(scores(gathering, signs=asked.signs, threads=asked.threads, progress=advance))
        left_out = [(name, reason) for name, reason, _ in gathering.left_out]
        return PairScores(first, second, found, left_out, gathering.warnings)


def _of_differences(first: str, second: str, asked: LoraInterference, events: Events) -> PairScores:
    from mergetool.lora.extract import open_diff
    from mergetool.lora.operations import delta_scores
    from mergetool.options.differences import DiffOptions

    options = DiffOptions(variant2=second, orthogonal=True, min_dim=1)  # what only one of them changes is scored too
    with open_diff(str(asked.base), first, options, skip_unmatched=asked.skip_unmatched) as pairing:
        with events.progress("score", sum(map(pairing.nbytes, pairing.decomposed))) as advance:
            found = list(delta_scores(pairing, signs=asked.signs, threads=asked.threads, progress=advance))
        skipped = [(pair.name, pair.reason) for pair in pairing.pairs if pair.reason]
        return PairScores(first, second, found, [*skipped, *pairing.left_out], [])


def run_lora_verify(asked: LoraVerify, events: Events) -> LoraVerified:
    """Compare base + LoRA with the tuned model, layer by layer, before and after rounding. Raises MergetoolError."""
    from mergetool.lora.verify import open_comparison, verify_lora

    started = time.monotonic()
    strength = cast(Fraction, asked.strength)
    with open_comparison(asked.base, str(asked.lora), asked.variant, strength=strength) as comparison:
        with events.progress("verify", comparison.bytes_read) as advance:
            report = verify_lora(comparison, threads=asked.threads, progress=advance)
        verified = LoraVerified(report, comparison.bytes_read, time.monotonic() - started, asked.max_residual)
        events.done(comparison, verified)
        return verified


def run_lora_inspect(asked: LoraInspect, events: Events) -> LoraContents:
    """Show what a LoRA holds: ranks, alphas, targets, norms, and who loads it whole. Raises MergetoolError."""
    from mergetool.adapters.describe import describe
    from mergetool.adapters.loaders import loading

    plot = cast("Path | None", asked.plot)
    if plot is not None:
        from mergetool.lora import plots

        plots.require_target(plot, overwrite=asked.overwrite)
    with _opened(asked) as file:
        with events.progress("norms", len(file.changes), "module") as advance:
            contents = describe(file, progress=advance)
        in_comfyui = None if contents.non_finite else _dora_difference(file, asked.model)
        if plot is not None:
            plots.write(plot, contents.targets, title=Path(asked.lora).name, overwrite=asked.overwrite)
        found = LoraContents(contents, loading(file), in_comfyui)
        events.done(file, found)
        return found


def _target(
    output: str | os.PathLike[str] | None, events: Events, *, dry_run: bool, folder: bool = False
) -> Target | None:
    from mergetool.checkpoint.outputs import lora_target

    require_output(output, dry_run=dry_run)
    if output is None:
        return None
    target = lora_target(output, folder=folder)
    if target.note:
        events.note(target.note)
    return target


def _anatomy(model: str | None) -> Anatomy | None:
    """The parts of the model that a LoRA's names are looked up in."""
    if model is None:
        return None
    from mergetool import models

    with models.open_model(model, names_only=True) as opened:
        return opened.anatomy


def _opened(asked: LoraConvert | LoraInspect) -> LoraFile:
    """The LoRA, with its names looked up."""
    from mergetool import models
    from mergetool.adapters import open_lora

    name = str(asked.lora)
    return open_lora(models.resolve(name).path, name=name, anatomy=_anatomy(asked.model))


def _dora_difference(file: LoraFile, model: str | None) -> Difference | None:
    """How far ComfyUI's formula leads from training's, where a model is given to measure it on."""
    if model is None or not any("dora_scale" in adapter.tensors for adapter in file.adapters):
        return None
    from mergetool import models
    from mergetool.adapters.dora_in_comfyui import difference

    with models.open_model(model) as base:
        return difference(file, base.anatomy, base.checkpoint)


lora_resize = called(LoraResize, run_lora_resize, "lora_resize")
lora_merge = called(LoraMerge, run_lora_merge, "lora_merge")
lora_orthogonal = called(LoraOrthogonal, run_lora_orthogonal, "lora_orthogonal")
lora_common = called(LoraCommon, run_lora_common, "lora_common")
lora_convert = called(LoraConvert, run_lora_convert, "lora_convert")
lora_interference = called(LoraInterference, run_lora_interference, "lora_interference")
lora_verify = called(LoraVerify, run_lora_verify, "lora_verify")
lora_inspect = called(LoraInspect, run_lora_inspect, "lora_inspect")
