"""Check a merge's weights against its recipe: derive every tensor again, and compare bytes.

The inputs are the recorded ones.

report = check_weights("out.safetensors", inputs={"tuned": "/models/tuned.safetensors"})
report.sound        True when every tensor is what its recipe says
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

from mergetool import models
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.comparison import distances
from mergetool.comparison.energies import Distance
from mergetool.engine import merge
from mergetool.engine.inputs import Inputs, contents_of, open_change
from mergetool.errors import DataError, ExpressionError, FamilyError, InputMissing, NonFiniteError
from mergetool.options.merging import MergeOptions
from mergetool.recipe import provenance
from mergetool.recipe.expression import Expression, parse
from mergetool.recipe.graph import Model
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
        """Whether every tensor follows the recipe, is finite, and comes from recorded inputs."""
        return self.derived and not self.damage()


def look_at_weights(
    opened: models.OpenedModel,
    parents: Sequence[str],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> WeightsReport:
    """Measure an open file without a recipe: NaN, infinity, and distances from ``parents``.

    ``progress`` gets bytes moved and bytes to move. Raises what opening and reading raise, and FamilyError for a parent that shares no tensor with it.
    """
    with ExitStack() as stack:
        output, result = opened.name, Input.of(opened)
        plan = plan_merge(parse(quote(output), known=[output]), [result], MergeOptions())
        inputs = Inputs(stack)
        others = [inputs.model(name) for name in parents]
        report = WeightsReport("", output, {name: name for name in parents}, kept=len(plan.tensors), derived=False)
        total = plan.bytes_read + plan.header.data_size + 2 * len(others) * plan.header.data_size
        moved = 0

        def advance(count: int) -> None:
            nonlocal moved
            moved += count
            progress(min(moved, total), total)

        outcome = merge.run(plan, _Nowhere(), threads=threads, non_finite="keep", measure="off", progress=advance)
        report.non_finite = outcome.non_finite
        for parent in others:
            if not distances.comparable([result, parent]):
                raise FamilyError(
                    f"{output} and {parent.name} share no tensor of one shape; name a parent of its own family."
                )
            with suppress(NonFiniteError):
                report.distances[parent.name] = distances.measure(result, parent, progress=advance)
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
        result = Input.of(opened)
        by_name = {model.name: model for _, model in again.places}
        for name in report.parents:
            # From or to NaN there is no distance; what holds it is named in `non_finite`, or is the parent's own affair.
            with suppress(NonFiniteError):
                report.distances[name] = distances.measure(result, by_name[name], progress=advance)
        return report


@dataclass(frozen=True)
class Reopened:
    """A merge, and its plan made again from ``places`` of its models. ``fingerprints`` are their present ones."""

    opened: models.OpenedModel
    recorded: provenance.Recorded
    plan: Plan
    places: list[tuple[str, Input]]
    fingerprints: Mapping[str, str]

    def report(self) -> WeightsReport:
        """The report as far as it is known before a tensor is read."""
        plan, recorded = self.plan, self.recorded
        anchor, factors = _anchor(plan), _factors(plan)
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


def _anchor(plan: Plan) -> str:
    """The file that a merge changes."""
    inner = plan.inputs[0].plan
    return plan.expression.anchor if inner is None else _anchor(inner)


def _factors(plan: Plan) -> dict[str, Fraction]:
    """The factor of every file in a merge, those of models that are expressions among them."""
    factors, total = plan.expression.graph.coefficients(), dict[str, Fraction]()
    for model in plan.inputs:
        inner = {model.name: Fraction(1)} if model.plan is None else _factors(model.plan)
        for name, factor in inner.items():
            total[name] = total.get(name, Fraction(0)) + factors.get(model.name, Fraction(0)) * factor
    return total


def reopen(output: str | models.OpenedModel, inputs: Mapping[str, str], stack: ExitStack) -> Reopened:
    """Plan the merge that ``output`` records again, from its inputs.

    ``output`` may be open; ``stack`` closes the files that this opens.

    ``inputs`` gives recorded names their places; other names are looked up as MODEL arguments, then beside the output. Raises
    DataError for a file without a recipe or with a damaged one, InputMissing for an input that is nowhere.
    """
    opened = stack.enter_context(models.open_model(output)) if isinstance(output, str) else output
    output = opened.name
    folder = models.resolve(output).path.absolute().parent
    recorded = provenance.read(opened.checkpoint.metadata, output)
    expression = _recorded_expression(recorded, output)
    again = _Recorded(stack, recorded.fingerprints, inputs, folder, output)
    read = again.models_of(expression, recorded.options.keep_from)
    read += [again.lora(name, read[0]) for name in expression.loras]
    prints = again.fingerprints(read)
    if expression.records_anchor:
        expression = expression.arranged(contents_of(read, prints))
    read.sort(key=lambda model: model.name != expression.anchor)
    plan = plan_merge(expression, read, recorded.options, fingerprints=prints)
    return Reopened(opened, recorded, plan, again.places, prints)


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


class _Recorded(Inputs):
    """The inputs of a recorded merge, by their recorded names; a model that was an expression is one of those names.

    Each is where ``given`` says, else the MODEL of its name, else beside the output.
    """

    def __init__(
        self, stack: ExitStack, names: Collection[str], given: Mapping[str, str], folder: Path, output: str
    ) -> None:
        super().__init__(stack, skip_unmatched=True)  # what of a LoRA matched nothing was said when it was merged
        self.places: list[tuple[str, Input]] = []
        self._recorded = names
        self._given = given
        self._folder = folder
        self._output = output

    def models_of(self, expression: Expression, keep_from: str | None) -> list[Input]:
        """The models of an expression, files in the order in which they were recorded."""
        named = dict.fromkeys([*expression.models, *([keep_from] if keep_from else [])])
        unknown = next((name for name in expression.loras if name not in self._recorded), None)
        if unknown is not None:
            raise self._damaged(unknown)
        place = {name: i for i, name in enumerate(self._recorded)}
        return [self.model(name) for name in sorted(named, key=lambda name: place.get(name, len(place)))]

    def _expression_of(self, name: str) -> Expression | None:
        if name in self._recorded:
            return None
        try:
            expression = parse(name, known=list(self._recorded))
        except ExpressionError:
            raise self._damaged(name) from None
        if len(expression.graph.terms) == 1 and isinstance(expression.graph.terms[0].operand, Model):
            raise self._damaged(name)
        return expression

    def _read(self, name: str) -> Input:
        for place in self._choices(name):
            try:
                opened = models.open_model(place)
            except InputMissing:
                continue
            self._stack.enter_context(opened.checkpoint)
            model = replace(Input.of(opened), name=name)
            self.places.append((place, model))
            return model
        raise _not_found(name)

    def _change(self, name: str, first: Input) -> Input:
        for place in self._choices(name):
            try:
                return open_change(name, first, self._stack, place=place, skip_unmatched=True)
            except InputMissing:
                continue
        raise _not_found(name)

    def _choices(self, name: str) -> list[str]:
        """The possible places of a recorded name."""
        if name in self._given:
            return [self._given[name]]
        beside = [self._folder / f"{name}.safetensors", self._folder / name]
        return [name, *(str(path) for path in beside if path.exists())]

    def _damaged(self, name: str) -> DataError:
        return DataError(
            f"{self._output} carries a damaged recipe in its metadata: {quoted(name)} is not among its inputs; it cannot be verified."
        )


def _not_found(name: str) -> InputMissing:
    return InputMissing(f"the input {quoted(name)} of the recipe is missing; name its place with `inputs={name}=PATH`.")


def against_header(plan: Plan, checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
    wanted = {name: (info.dtype, info.shape) for name, info in plan.header.tensors.items()}
    stored = {name: (info.dtype, info.shape) for name, info in checkpoint.tensors.items()}
    missing = [name for name, kind in wanted.items() if stored.get(name) != kind]
    return missing, [name for name in stored if name not in wanted]


class Comparer:
    """Takes a merge's new bytes, and compares them with the stored ones.

    ``compared`` counts bytes.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.compared = 0
        self._differing: dict[str, int] = {}
        self._checkpoint = checkpoint
        self._lock = threading.Lock()

    @property
    def differing(self) -> dict[str, int]:
        """Map every differing tensor to the offset of its first other byte, in the file's order."""
        return {name: self._differing[name] for name in self._checkpoint.tensors if name in self._differing}

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Compare the bytes from ``start`` of tensor ``name``; safe from several threads."""
        wanted = bytes(data)
        stored = self._checkpoint.read(name, start, len(wanted))
        with self._lock:
            self.compared += len(wanted)
            if stored != wanted:
                first = start + next(i for i, (a, b) in enumerate(zip(stored, wanted, strict=True)) if a != b)
                self._differing[name] = min(first, self._differing.get(name, first))
