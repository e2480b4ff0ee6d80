"""LoRAs made of others: `lora_resize`, `lora_merge`, `lora_common` and the rest."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from mergetool.adapters.formats import FORMATS, KEY_FORMATS, KeyFormat
from mergetool.api.events import Events, Request
from mergetool.api.functions import called
from mergetool.errors import UsageError
from mergetool.options.combining import (
    GroupOptions,
    LookUpOptions,
    SumOptions,
    SumRunOptions,
)
from mergetool.options.kinds import Choice, Loras, ModelName, OutputPath
from mergetool.options.running import DRY, UnmatchedOptions, WriteOptions, require_output
from mergetool.options.table import Option

if TYPE_CHECKING:
    from mergetool.adapters.convert import Converted
    from mergetool.adapters.loaders import Loading
    from mergetool.adapters.lora_file import LoraFile
    from mergetool.arch import Anatomy
    from mergetool.checkpoint.outputs import Target
    from mergetool.lora.combine import Combined, Derive
    from mergetool.lora.gathering import Gathering

ALora = Annotated[
    str | os.PathLike[str],
    Option(help="A LoRA in any spelling: a file or a PEFT folder.", kind=ModelName("LORA", stored=True), argument=True),
]
Written = Annotated[
    str | os.PathLike[str] | None,
    Option(help="Write the LoRA to FILE.safetensors.", section="Output", kind=OutputPath(), short="-o", default=DRY),
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
        Option(
            help="LoRAs, each with a strength if it is not 1, e.g. style.safetensors:0.8.", kind=Loras(), argument=True
        ),
    ]
    output: Written = None


@dataclass(frozen=True)
class LoraOrthogonal(Request, SumOptions, SumRunOptions):
    """The part of one LoRA that is orthogonal to another."""

    first: Annotated[
        str | os.PathLike[str],
        Option(help="The LoRA to keep the part of.", kind=ModelName("A", stored=True), argument=True),
    ]
    second: Annotated[
        str | os.PathLike[str],
        Option(help="The LoRA that the part is orthogonal to.", kind=ModelName("B", stored=True), argument=True),
    ]
    output: Written = None


@dataclass(frozen=True)
class LoraCommon(Request, SumOptions, SumRunOptions):
    """A request for the directions that two LoRAs share."""

    first: Annotated[str | os.PathLike[str], Option(help="One LoRA.", kind=ModelName("A", stored=True), argument=True)]
    second: Annotated[
        str | os.PathLike[str], Option(help="Another LoRA.", kind=ModelName("B", stored=True), argument=True)
    ]
    output: Written = None


@dataclass(frozen=True)
class LoraConvert(Request, LookUpOptions, UnmatchedOptions, WriteOptions):
    """A LoRA under the names of another program."""

    lora: ALora
    output: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write the LoRA to FILE.safetensors, with peft to a folder.",
            section="Output",
            kind=OutputPath(),
            short="-o",
            default=DRY,
        ),
    ] = None
    key_format: Annotated[
        KeyFormat,
        Option(help="Name the keys as this program does.", section="Output", kind=Choice(KEY_FORMATS, "FORMAT")),
    ] = "default"


@dataclass(frozen=True, slots=True)
class SumPlan:
    """The plan of a LoRA made of others: the sum for each module, and a word for the operation."""

    command: str
    gathering: Gathering


@dataclass(frozen=True)
class Summed:
    """A LoRA made of others, written to ``output`` in ``seconds``.

    With ``dry_run`` it would be, and ``combined`` is None.

    ``loading`` says which releases load it whole, ``warnings`` what a user of the files that were read should know.
    """

    output: Path | None
    warnings: Sequence[str]
    combined: Combined | None = None
    loading: Sequence[Loading] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class LoraConverted:
    """A converted LoRA, written to ``output`` in ``seconds``, with its losses.

    With ``dry_run`` it would be written. The losses are what had to be rounded or left out.
    """

    output: Path | None
    dialect: str
    converted: Converted
    loading: Sequence[Loading]
    seconds: float
    dry_run: bool


def run_lora_resize(asked: LoraResize, events: Events) -> Summed:
    """Make a LoRA smaller: to a rank, to a share of its energy, or to a file's size. Raises MergetoolError."""
    return _sum("resize", [(str(asked.lora), Fraction(1))], asked, events)


def run_lora_merge(asked: LoraMerge, events: Events) -> Summed:
    """Add LoRAs up to one, exactly or at a smaller rank. Raises MergetoolError."""
    return _sum("merge", cast("Sequence[tuple[str, Fraction]]", asked.loras), asked, events)


def run_lora_orthogonal(asked: LoraOrthogonal, events: Events) -> Summed:
    """Take the part of one LoRA that is orthogonal to another, in every module by itself.

    Raises MergetoolError.
    """
    from mergetool.lora import operations

    return _sum("orthogonal", _both(asked), asked, events, prepare=operations.orthogonal)


def run_lora_common(asked: LoraCommon, events: Events) -> Summed:
    """Keep the directions that two LoRAs both write to and both read. Raises MergetoolError."""
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
    """Read, combine and write: the only place where that is done. ``prepare`` changes the addends, ``derive`` what is made of them."""
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
    from mergetool.adapters.convert import convert
    from mergetool.adapters.loaders import loading_of
    from mergetool.lora import memory

    target = _target(asked.output, events, dry_run=asked.dry_run, folder=FORMATS[asked.key_format].is_folder)
    started = time.monotonic()
    with opened_lora(asked.lora, asked.model) as file:
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
    from mergetool.engine.inputs import open_model

    with open_model(model, names_only=True) as opened:
        return opened.anatomy


def opened_lora(lora: str | os.PathLike[str], model: str | None) -> LoraFile:
    """The LoRA, with its names looked up."""
    from mergetool import models
    from mergetool.adapters.lora_file import open_lora

    return open_lora(models.resolve(str(lora)).path, name=str(lora), anatomy=_anatomy(model))


lora_resize = called(LoraResize, run_lora_resize, "lora_resize")
lora_merge = called(LoraMerge, run_lora_merge, "lora_merge")
lora_orthogonal = called(LoraOrthogonal, run_lora_orthogonal, "lora_orthogonal")
lora_common = called(LoraCommon, run_lora_common, "lora_common")
lora_convert = called(LoraConvert, run_lora_convert, "lora_convert")
