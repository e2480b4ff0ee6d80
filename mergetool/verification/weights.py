"""A merge's weights against its own recipe: every tensor is derived again from the recorded inputs and compared byte by byte.

report = check_weights("out.safetensors", inputs={"tuned": "/models/tuned.safetensors"})
report.sound        True when every tensor is what its recipe says
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from mergetool import models
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.comparison import distances
from mergetool.comparison.energies import Distance
from mergetool.engine import job, merge
from mergetool.errors import DataError, FamilyError, InputMissing, NonFiniteError
from mergetool.options.merging import MergeOptions
from mergetool.recipe import provenance
from mergetool.recipe.expression import Expression, parse
from mergetool.recipe.plan import Plan, plan_merge
from mergetool.recipe.quotes import quote
from mergetool.recipe.steps import MERGED, Input


@dataclass
class WeightsReport:
    """The result of a check of weights. ``merged`` and ``kept`` count tensors; a tensor with parts of both kinds counts as merged.

    ``differing`` maps a tensor to the offset of the first byte that is not what the recipe says; ``changed`` names
    inputs whose content is not what was merged; ``missing`` and ``extra`` are tensors that only the recipe or only
    the file has, or has in another shape or dtype; ``non_finite`` counts NaN and infinities of a tensor. ``parents``
    are the models that the expression adds, by their recorded names, the anchor in front, each with where it is;
    ``distances`` how far the output lies from each, but for those where NaN or infinity leave no distance.

    ``outside`` says what of a whole file is other than what is written now, beside its tensors, where that was looked at (`replay`).

    ``derived`` is False for a file without a recipe: its ``expression`` is empty, its ``parents`` are those that the user named, and ``kept``
    counts its tensors, of which only NaN and infinity are looked for.
    """

    expression: str
    anchor: str
    parents: dict[str, str] = field(default_factory=dict)
    merged: int = 0
    kept: int = 0
    bytes_compared: int = 0
    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    differing: dict[str, int] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    distances: dict[str, list[Distance]] = field(default_factory=dict)
    outside: list[str] = field(default_factory=list)
    derived: bool = True

    def damage(self) -> list[tuple[str, list[str]]]:
        """Name the damage in words, each with its inputs or tensors."""
        kinds = (
            ("changed since they were merged", self.changed),
            ("missing, or of another shape or dtype", self.missing),
            ("not in the recipe", self.extra),
            ("not what the recipe says", [f"{name} (from byte {at})" for name, at in self.differing.items()]),
            ("other than what is written now", self.outside),
            ("with NaN or infinity", [f"{name} ({count})" for name, count in self.non_finite.items()]),
        )
        return [(fault, names) for fault, names in kinds if names]

    @property
    def sound(self) -> bool:
        """Whether every tensor is what the recipe says, finite and from the recorded inputs."""
        return self.derived and not self.damage()


def look_at_weights(
    opened: models.OpenedModel,
    parents: Sequence[str],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightsReport:
    """Measure an open file without a recipe: NaN, infinity, and its distance from each of ``parents``.

    ``progress`` gets bytes moved and bytes to move. Raises what opening and reading raise, and FamilyError for a parent that shares no tensor with it.
    """
    with ExitStack() as stack:
        output, result = opened.name, Input(opened.name, opened.checkpoint, opened.anatomy)
        plan = plan_merge(parse(quote(output), known=[output]), [result], MergeOptions())
        others = [(name, stack.enter_context(models.open_model(name))) for name in parents]
        report = WeightsReport("", output, {name: name for name in parents}, kept=len(plan.tensors), derived=False)
        total = plan.bytes_read + plan.header.data_size + 2 * len(others) * plan.header.data_size
        moved = 0

        def advance(count: int) -> None:
            nonlocal moved
            moved += count
            progress(min(moved, total), total)

        outcome = merge.run(plan, _Nowhere(), threads=threads, non_finite="keep", measure="off", progress=advance)
        report.non_finite = outcome.non_finite
        for name, opened in others:
            parent = Input(name, opened.checkpoint, opened.anatomy)
            if not distances.comparable([result, parent]):
                raise FamilyError(f"{output} and {name} share no tensor of one shape; name a parent of its own family.")
            with suppress(NonFiniteError):
                report.distances[name] = distances.measure(result, parent, progress=advance)
        return report


class _Nowhere:
    """An output that keeps nothing."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Forget the bytes."""


def check_weights(
    output: str | models.OpenedModel,
    *,
    inputs: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightsReport:
    """Do the merge that ``output`` records again, in memory, and compare.

    ``inputs`` gives the recorded names of models their places; other names are looked up as MODEL arguments, then beside
    the output. Norms against the parents are measured on the way. ``progress`` gets bytes moved and bytes to move. Raises DataError for a file without a recipe or with a
    damaged one, InputMissing for an input that is nowhere, and what planning and reading raise.
    """
    with ExitStack() as stack:
        again = reopen(output, inputs or {}, stack)
        opened, plan, report = again.opened, again.plan, again.report()
        comparer = Comparer(opened.checkpoint)
        stored = sum(info.nbytes for info in opened.checkpoint.tensors.values())
        total = plan.bytes_read + plan.header.data_size + 2 * len(report.parents) * stored
        moved = 0

        def advance(count: int) -> None:
            nonlocal moved
            moved += count
            progress(min(moved, total), total)

        if not (report.missing or report.extra):
            outcome = merge.run(plan, comparer, threads=threads, non_finite="keep", measure="off", progress=advance)
            report.non_finite = outcome.non_finite
            report.bytes_compared, report.differing = comparer.compared, comparer.differing
        result = Input(opened.name, opened.checkpoint, opened.anatomy)
        for model in plan.inputs:
            if model.name in report.parents:
                # From or to NaN there is no distance; what holds it is named in `non_finite`, or is the parent's own affair.
                with suppress(NonFiniteError):
                    report.distances[model.name] = distances.measure(result, model, progress=advance)
        return report


@dataclass(frozen=True)
class Reopened:
    """A merge that was made, and its plan made again: ``places`` are where its models are, ``fingerprints`` what they are now."""

    opened: models.OpenedModel
    recorded: provenance.Recorded
    plan: Plan
    places: list[tuple[str, Input]]
    fingerprints: Mapping[str, str]

    def report(self) -> WeightsReport:
        """The report as far as it is known before a tensor is read."""
        plan, recorded = self.plan, self.recorded
        anchor, factors = plan.expression.anchor, plan.expression.graph.coefficients()
        report = WeightsReport(recorded.expression, anchor)
        report.parents = {
            model.name: place
            for place, model in sorted(self.places, key=lambda entry: entry[1].name != anchor)
            if factors.get(model.name, 0) > 0 or model.name == anchor
        }
        report.changed = [name for name, now in self.fingerprints.items() if now != recorded.fingerprints[name]]
        report.missing, report.extra = against_header(plan, self.opened.checkpoint)
        report.merged = sum(any(step.reason == MERGED for step in tensor.steps) for tensor in plan.tensors)
        report.kept = len(plan.tensors) - report.merged
        return report


def reopen(output: str | models.OpenedModel, inputs: Mapping[str, str], stack: ExitStack) -> Reopened:
    """The merge that ``output``, open or not, records, planned again from its inputs; ``stack`` closes what is opened here.

    ``inputs`` gives recorded names their places; other names are looked up as MODEL arguments, then beside the output. Raises
    DataError for a file without a recipe or with a damaged one, InputMissing for an input that is nowhere.
    """
    opened = stack.enter_context(models.open_model(output)) if isinstance(output, str) else output
    output = opened.name
    folder = models.resolve(output).path.absolute().parent
    recorded = provenance.read(opened.checkpoint.metadata, output)
    expression = _recorded_expression(recorded, output)
    named = [
        *expression.models,
        *expression.loras,
        *([recorded.options.keep_from] if recorded.options.keep_from else []),
    ]
    unknown = next((name for name in named if name not in recorded.fingerprints), None)
    if unknown is not None:
        raise DataError(
            f"{output} carries a damaged recipe in its metadata: {quoted(unknown)} is not among its inputs; it cannot be verified."
        )
    given = {name: inputs.get(name) for name in recorded.fingerprints}
    places = [_open_input(name, place, folder, stack) for name, place in given.items() if name not in expression.loras]
    opened_models = [model for _, model in places]
    opened_models += [_open_lora(name, given.get(name), folder, opened_models[0], stack) for name in expression.loras]
    prints = {model.name: model.checkpoint.fingerprint() for model in opened_models}
    if expression.records_anchor:
        expression = expression.arranged(prints)
    opened_models.sort(key=lambda model: model.name != expression.anchor)
    return Reopened(
        opened, recorded, plan_merge(expression, opened_models, recorded.options, fingerprints=prints), places, prints
    )


def _recorded_expression(recorded: provenance.Recorded, output: str) -> Expression:
    expression = parse(recorded.expression, known=list(recorded.fingerprints))
    if recorded.anchor is None:
        # Before the anchor was recorded it was the first of the inputs, which need not be the leftmost model of the recorded text.
        first = next((name for name in recorded.fingerprints if name in expression.models), None)
        if first is None:
            raise DataError(f"{output} carries a damaged recipe in its metadata: it records none of its inputs.")
        return expression.as_written(first)
    if recorded.anchor not in expression.models:
        raise DataError(
            f"{output} carries a damaged recipe in its metadata: {quoted(recorded.anchor)} is not a model of its expression."
        )
    return expression.anchored(recorded.anchor)


def _open_input(name: str, place: str | None, folder: Path, stack: ExitStack) -> tuple[str, Input]:
    """An input and where it was found: the place given, as a MODEL, or beside the output under its recorded name."""
    beside = [folder / f"{name}.safetensors", folder / name]
    choices = [place] if place is not None else [name, *(str(path) for path in beside if path.exists())]
    for choice in choices:
        try:
            opened = models.open_model(choice)
        except InputMissing:
            continue
        stack.enter_context(opened.checkpoint)
        return choice, Input(name, opened.checkpoint, opened.anatomy)
    raise _not_found(name)


def _open_lora(name: str, place: str | None, folder: Path, model: Input, stack: ExitStack) -> Input:
    """A LoRA of the recipe; what matched nothing was said when it was merged."""
    beside = [folder / f"{name}.safetensors", folder / name]
    for choice in [place] if place is not None else [name, *(str(path) for path in beside if path.exists())]:
        try:
            return job.open_change(name, model, stack, place=choice, skip_unmatched=True)
        except InputMissing:
            continue
    raise _not_found(name)


def _not_found(name: str) -> InputMissing:
    return InputMissing(
        f"the input {quoted(name)} of the recipe is not found; say where it is with `inputs={name}=PATH`."
    )


def against_header(plan: Plan, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    wanted = {name: (info.dtype, info.shape) for name, info in plan.header.tensors.items()}
    stored = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    missing = [name for name, kind in wanted.items() if stored.get(name) != kind]
    return missing, [name for name in stored if name not in wanted]


class Comparer:
    """Takes what a merge would write, and compares it with what is there.

    ``compared`` counts bytes, ``differing`` maps a tensor to the offset of its first byte that is another.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.compared = 0
        self.differing: dict[str, int] = {}
        self._checkpoint = checkpoint
        self._lock = threading.Lock()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Compare the bytes from ``start`` of tensor ``name``; safe from several threads."""
        wanted = bytes(data)
        stored = self._checkpoint.read(name, start, len(wanted))
        with self._lock:
            self.compared += len(wanted)
            if stored != wanted:
                first = start + next(i for i, (a, b) in enumerate(zip(stored, wanted, strict=True)) if a != b)
                self.differing[name] = min(first, self.differing.get(name, first))
