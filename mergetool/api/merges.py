"""Merges by expression: `merge`, and two that change one model, `convert` and `bake`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from mergetool.api.events import Events, Request
from mergetool.api.functions import called
from mergetool.errors import LineageError
from mergetool.options.kinds import Loras, ModelName, OutputPath, String
from mergetool.options.merging import ContainerOptions, MergeOptions
from mergetool.options.running import (
    DRY,
    MergeRunOptions,
    NonFiniteOptions,
    ShardOptions,
    ThreadOptions,
    WriteOptions,
    require_output,
)
from mergetool.options.table import Option, part, values
from mergetool.recipe.quotes import quote, with_loras

if TYPE_CHECKING:
    from mergetool.checkpoint.outputs import Target
    from mergetool.comparison.finding import Finding
    from mergetool.comparison.preflight import Preflight
    from mergetool.engine.runs import Outcome
    from mergetool.recipe.plan import Plan


@dataclass(frozen=True)
class Merge(Request, MergeOptions, ShardOptions, MergeRunOptions):
    """A merge of checkpoints by an expression."""

    expression: Annotated[
        str,
        Option(
            help='The expression, e.g. "alkahest + 20 * (tuned - base)", or a recipe file.',
            kind=String("EXPRESSION|RECIPE.yaml"),
            argument=True,
            key="merge",
        ),
    ]
    output: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write the model to FILE.safetensors or FOLDER/; for a recipe, the folder of its outputs.",
            section="Output",
            kind=OutputPath(),
            short="-o",
            default=DRY,
        ),
    ] = None


@dataclass(frozen=True)
class Convert(Request, ContainerOptions, ShardOptions, ThreadOptions, NonFiniteOptions, WriteOptions):
    """The same model in another dtype, container, layout or number of files."""

    model: Annotated[
        str,
        Option(
            help="A name, a file, a folder, hf://org/repo, or an expression of them.", kind=ModelName(), argument=True
        ),
    ]
    output: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write the model to FILE.safetensors or FOLDER/.",
            section="Output",
            kind=OutputPath(),
            short="-o",
            default=DRY,
        ),
    ] = None


@dataclass(frozen=True)
class Bake(Request, MergeOptions, ShardOptions, MergeRunOptions):
    """LoRAs added to a model."""

    model: Annotated[
        str,
        Option(
            help="The model to add to, in any layout or container, or an expression.",
            kind=ModelName(),
            argument=True,
        ),
    ]
    loras: Annotated[
        Mapping[str, float] | Sequence[str | tuple[str, Fraction]],
        Option(
            help="LoRAs, each with a strength if it is not 1, e.g. style.safetensors:0.8.", kind=Loras(), argument=True
        ),
    ]
    output: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write the model to FILE.safetensors or FOLDER/.",
            section="Output",
            kind=OutputPath(),
            short="-o",
            default=DRY,
        ),
    ] = None

    @property
    def expression(self) -> str:
        """The merge that adds them."""
        return with_loras(self.model, cast("Sequence[tuple[str, Fraction]]", self.loras))


@dataclass(frozen=True)
class Merged:
    """A merge at ``output``, or planned for it with ``dry_run``.

    A dry run has no ``outcome``, and may have no ``output``.

    ``tensors`` maps what was done ("merged", "protected: refiner", ...) to the output tensors that it was done to, ``left_out`` a name to why it is not
    in the output; ``warnings`` are what a user should know. ``outcome`` has what became of the delta in rounding, what was capped, and of a conversion
    the error of every tensor.
    """

    output: Path | None
    expression: str
    tensors: Mapping[str, Sequence[str]]
    left_out: Mapping[str, str]
    warnings: Sequence[str]
    outcome: Outcome | None

    @property
    def path(self) -> Path:
        """The ``output`` of a merge that was written."""
        assert self.output is not None
        return self.output


@dataclass(frozen=True, slots=True)
class Planned:
    """A merge before it runs: its plan, its target, and the context of its errors."""

    plan: Plan
    target: Target | None
    task: Any = None
    located: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True, slots=True)
class Done:
    """The outcome of a merge, in ``seconds``, at ``target``."""

    target: Target
    outcome: Outcome
    seconds: float


def run_merge(asked: Merge, events: Events, *, keeps_current: bool = False) -> Merged:
    """Merge checkpoints by an expression: complete, or not at all.

    Raises MergetoolError: ExpressionError, PatternError or UsageError for the request, InputMissing and DataError for inputs, LineageError for
    models that do not seem to belong together, OutputError, BusyError and StorageError for the output, NonFiniteError for NaN and infinity.
    """
    return _one(asked.expression, asked, part(MergeOptions, asked), events, keeps_current=keeps_current)


def run_bake(asked: Bake, events: Events) -> Merged:
    """Add LoRAs to a checkpoint of any layout or container, in one pass. Raises what `merge` raises."""
    return _one(asked.expression, asked, part(MergeOptions, asked), events, word="bake")


def run_convert(asked: Convert, events: Events) -> Merged:
    """Write a model in another form.

    The outcome has the error of every tensor. Raises the same as `merge`.
    """
    from mergetool.recipe.argument import expression_of

    options = MergeOptions(**values(part(ContainerOptions, asked)))
    how = MergeRunOptions(
        device="cpu",
        **values(part(ThreadOptions, asked)),
        **values(part(NonFiniteOptions, asked)),
        **values(part(WriteOptions, asked)),
    )
    if (asked.dtype or asked.quant) and expression_of(asked.model) is not None:
        events.note(f"{asked.model} is rounded as its file would be, and then converted; mergetool merge rounds once.")
    return _one(quote(asked.model), asked, options, events, word="convert", how=how)


def _one(
    expression: str,
    asked: Merge | Bake | Convert,
    options: MergeOptions,
    events: Events,
    *,
    word: str = "merge",
    how: MergeRunOptions | None = None,
    keeps_current: bool = False,
) -> Merged:
    """Make one merge; with ``keeps_current`` an up-to-date output stays, as a recipe's does."""
    from mergetool.checkpoint.outputs import model_target
    from mergetool.engine import job
    from mergetool.making import state

    require_output(asked.output, dry_run=asked.dry_run)
    target = None
    if asked.output is not None:
        target = model_target(
            asked.output, layout=options.layout, shard_size=asked.shard_bytes, overwrite=asked.overwrite
        )
        if target.note:
            events.note(target.note)
    ran = how or part(MergeRunOptions, asked)
    with job.open_merge(expression, options, fingerprints=not asked.dry_run, skip_unmatched=ran.skip_unmatched) as plan:
        if keeps_current and target is not None and state.of_merge(plan, target, asked.shard_bytes) == state.CURRENT:
            events.current(target.path)
            return _merged(Planned(plan, target), None, None)
        (merged,) = make([Planned(plan, target)], ran, events, word=word, shard_size=asked.shard_bytes)
    return merged


def make(
    planned: Sequence[Planned],
    how: MergeRunOptions,
    events: Events,
    *,
    word: str = "merge",
    shard_size: int | None = None,
) -> list[Merged]:
    """Guard and run merges of one pass: the only place where that is done. A conversion has nothing to guard and is compared with what it stored.

    With ``how.dry_run`` it stops before the run. Raises what `run_merge` says.
    """
    from mergetool.comparison import preflight
    from mergetool.engine import bundles, job
    from mergetool.engine import device as devices
    from mergetool.engine.memory import memory_needed, memory_of
    from mergetool.engine.method_calls import require_torch

    started = time.monotonic()
    compared = word == "convert"
    plans = [merge.plan for merge in planned]
    require_torch(plans)
    on = devices.choose(how.device, work=sum(plan.bytes_read for plan in plans), memory=how.gpu_bytes)
    checks: list[Preflight | None] = []
    for merge in planned:
        events.output(merge.task)
        events.plan(merge.plan, job.BASE_MEMORY + memory_needed(merge.plan, how.threads, on))
        if compared:
            _require_sound(preflight.of_models(merge.plan.inputs), events)
        checks.append(None if compared else _checked(merge, preflight.check(merge.plan), how, events))
    moved = job.bytes_moved(plans, on)
    if len(plans) > 1:
        passes, memory = len(bundles.passes(plans, on)), job.BASE_MEMORY + memory_of(plans, how.threads, on)
        events.together(len(plans), passes, moved, memory, sum(plan.header.file_size for plan in plans))
    if how.dry_run:
        return [_merged(merge, checked, None) for merge, checked in zip(planned, checks, strict=True)]
    targets = [merge.target for merge in planned if merge.target is not None]
    with events.progress(word, moved, publishes=True) as advance:
        outcomes = job.run_merges(
            plans,
            targets,
            overwrite=how.overwrite,
            shard_size=shard_size,
            threads=how.threads,
            reader=how.reader,
            non_finite=how.non_finite,
            device=on,
            measure=how.measure,
            compared=compared,
            resume=how.resume,
            progress=advance,
        )
    seconds = time.monotonic() - started
    for merge, target, outcome in zip(planned, targets, outcomes, strict=True):
        events.output(merge.task)
        events.done(merge.plan, Done(target, outcome, seconds))
    return [_merged(merge, checked, outcome) for merge, checked, outcome in zip(planned, checks, outcomes, strict=True)]


def _checked(planned: Planned, checked: Preflight, how: MergeRunOptions, events: Events) -> Preflight:
    """Tell what the preflight found. Raises LineageError for an error in it, unless with ``force``."""
    overruled = how.force or how.dry_run
    for finding in checked.findings:
        if overruled or not finding.is_error:
            events.finding(finding)
    events.checked(checked)
    if not overruled:
        with planned.located():
            checked.refuse()
    return checked


def _require_sound(findings: Iterable[Finding], events: Events) -> None:
    """Refuse a conversion of an expression whose lineage is an error. Raises LineageError for an error."""
    for finding in findings:
        if finding.is_error:
            raise LineageError(f"{finding.text}; write it with mergetool merge and `force`, then convert that file.")
        events.finding(finding)


def _merged(planned: Planned, checked: Preflight | None, outcome: Outcome | None) -> Merged:
    plan, findings = planned.plan, () if checked is None else checked.findings
    warnings = (*plan.warnings, *(finding.text for finding in findings))
    path = None if planned.target is None else planned.target.path
    return Merged(path, str(plan.expression.graph), plan.reasons(), dict(plan.left_out), warnings, outcome)


merge = called(Merge, run_merge, "merge")
convert = called(Convert, run_convert, "convert")
bake = called(Bake, run_bake, "bake")
