"""Two models side by side in one pass: sums of every part, and the loss to rounding.

The loss is that of a merge of their difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fractions import Fraction

from mergetool import models
from mergetool.arch import meeting
from mergetool.arch.encoders import is_encoder
from mergetool.comparison import lineage
from mergetool.comparison.chunks import Chunk, ComparedModels, stream
from mergetool.comparison.distances import by_part, comparable, cut
from mergetool.comparison.energies import Distance, Energies
from mergetool.comparison.finding import Finding
from mergetool.comparison.heatmap import block
from mergetool.engine.feeding.read_ahead import give_way
from mergetool.engine.feeding.values import Reader
from mergetool.engine.inputs import Inputs
from mergetool.engine.jobs import Job, jobs
from mergetool.engine.movements import Movements
from mergetool.engine.threads import asked
from mergetool.errors import CheckFailed, UsageError
from mergetool.ops.movement import Movement
from mergetool.options.comparing import RECOMMENDED, TARGET, Condition
from mergetool.options.merging import MergeOptions
from mergetool.options.multipliers import number
from mergetool.recipe.expression import parse
from mergetool.recipe.plan import Plan, plan_merge
from mergetool.recipe.quotes import quote
from mergetool.recipe.steps import MERGED, Input


@dataclass(frozen=True)
class Comparison:
    """The open models, and the ``parts`` to measure in the order of reading.

    Parts that are ``excluded`` count in no total, and ``left_out`` gives the reason for each part that is not
    measured. ``unmet`` tells how much of the models has no counterpart, where that is much. ``options`` are those of
    the merge whose rounding is looked at.
    """

    operands: ComparedModels
    options: MergeOptions
    parts: tuple[str, ...]
    excluded: frozenset[str]
    left_out: tuple[tuple[str, str], ...]
    known: tuple[str, ...]
    unmet: tuple[Finding, ...] = ()

    @property
    def base(self) -> Input:
        """The model that is subtracted."""
        return self.operands.inputs[self.operands.base]

    @property
    def bytes_read(self) -> int:
        """Bytes that the pass will read."""
        inputs = [self.operands.inputs[column].anatomy.parts for column in self.operands.columns]
        return sum(parts[part].nbytes for parts in inputs for part in self.parts)

    def require_groups(self, conditions: Sequence[Condition]) -> None:
        """Raises UsageError for a condition on a group of which nothing is measured."""
        anatomy = self.base.anatomy
        there = {group for part in self.parts for group in anatomy.family.groups(part, anatomy.parts[part].shape)}
        known = [group for group in anatomy.family.group_names(anatomy) if group in there]
        for condition in conditions:
            if condition.group is not None and condition.group not in known:
                raise UsageError(
                    f'`fail_on` names "{condition.group}", which is no group of these models; choose one of {", ".join(known)}.'
                )

    def expression(self, multiplier: Fraction) -> str:
        """The merge that the rounding figures are of."""
        columns = (self.operands.onto, self.operands.variant, self.operands.base)
        onto, variant, base = (self.operands.inputs[column].name for column in columns)
        return merge_of(onto, variant, base, multiplier)

    def plan(self, multiplier: Fraction) -> Plan:
        """The plan of that merge, as `engine.job.open_merge` makes it."""
        expression = parse(self.expression(multiplier), known=self.known)
        by_name = {model.name: model for model in self.operands.inputs}
        return plan_merge(expression, [by_name[name] for name in expression.models], self.options)


@dataclass(frozen=True)
class Report:
    """The result of a comparison.

    ``excluded`` parts are measured and in no total. ``expression`` is the merge, with ``multiplier``, whose rounding to ``dtype``
    ``rounding`` tells of: by group, what `mergetool merge` reports. ``target`` is the wanted change, as a share. ``failed`` are the
    conditions that hold and should not, in words.
    """

    base: str
    variant: str
    onto: str
    reference: tuple[str, str] | None
    distances: tuple[Distance, ...]
    excluded: frozenset[str]
    left_out: tuple[tuple[str, str], ...]
    group_names: tuple[str, ...]
    multiplier: Fraction
    expression: str
    options: MergeOptions
    dtype: str
    rounding: dict[str, Movement]
    lost: Movement
    sampled: bool
    target: float
    lineage: tuple[Finding, ...]
    failed: tuple[str, ...] = ()

    def require_passed(self) -> None:
        """Raises CheckFailed where a condition holds that should not."""
        if self.failed:
            raise CheckFailed(f"{self.base} and {self.variant}: {'; '.join(self.failed)}.")

    @property
    def kept(self) -> list[str]:
        """The excluded parts of the model, which merges keep; the others are of text encoders."""
        return [name for name in self.excluded if not is_encoder(name)]

    @property
    def included(self) -> list[Distance]:
        """The parts that count in the totals."""
        return [distance for distance in self.distances if distance.name not in self.excluded]

    @property
    def total(self) -> Energies:
        """The sums over all parts that count."""
        return Energies.total(distance.energies for distance in self.included)

    def groups(self) -> dict[str, Energies]:
        """The sums by group of the family, over the parts that count.

        A group of which no part counts has the sums of all its parts. Groups overlap.
        """
        energies = {}
        for group in self.group_names:
            held = [distance for distance in self.distances if group in distance.groups]
            counted = [distance for distance in held if distance.name not in self.excluded]
            if held:
                energies[group] = Energies.total(distance.energies for distance in counted or held)
        return energies

    def blocks(self) -> dict[str, Energies]:
        """The sums by block, in the order of a forward pass.

        What lies outside the blocks has rows of its own; excluded parts count here.
        """
        held: dict[str, list[Energies]] = {}
        for distance in self.distances:
            held.setdefault(block(distance), []).append(distance.energies)
        return {name: Energies.total(energies) for name, energies in held.items()}

    def value(self, metric: str, group: str | None) -> float | None:
        """The value of one of `METRICS` for a group, or for all parts.

        It is None where nothing differs, or no reference is there.
        """
        energies = self.total if group is None else self.groups()[group]
        movement = self.lost if group is None else self.rounding.get(group)
        match metric:
            case "distance":
                return energies.distance
            case "cosine":
                return energies.cosine
            case "reference":
                return energies.to_reference
            case "target":
                return energies.to_change(self.target)
        if movement is None or not movement.moved:
            return None
        return movement.eaten / movement.moved if metric == "untraced" else 1 - movement.projection

    def failing(self, conditions: Sequence[Condition]) -> tuple[str, ...]:
        """The conditions that hold, in words."""
        sentences = []
        for condition in conditions:
            value = self.value(condition.metric, condition.group)
            if value is not None and condition.holds(value):
                sentences.append(
                    f"{condition.metric} of {condition.group or 'all'} is {value:.4g}, {condition.sign} {condition.limit:g}"
                )
        return tuple(sentences)

    def merge_with(self, multiplier: Fraction) -> str:
        """The expression of the merge with another multiplier."""
        return merge_of(self.onto, self.variant, self.base, multiplier)

    def is_excluded(self, group: str) -> bool:
        """Whether no part of a group counts in the totals."""
        return all(distance.name in self.excluded for distance in self.distances if group in distance.groups)

    @property
    def recommended(self) -> Fraction | None:
        """The recommended multiplier, to four digits; None where nothing differs.

        It gives the delta the size of the reference delta, or without one makes the wanted change.
        """
        return advised(self.total, self.target, referenced=self.reference is not None)


def merge_of(onto: str, variant: str, base: str, multiplier: Fraction) -> str:
    """``onto + multiplier * (variant - base)`` as an expression."""
    size = "" if abs(multiplier) == 1 else f"{number(abs(multiplier))}*"
    return f"{quote(onto)} {'-' if multiplier < 0 else '+'} {size}({quote(variant)} - {quote(base)})"


def advised(total: Energies, target: float, *, referenced: bool) -> Fraction | None:
    """See `Report.recommended`."""
    multiplier = total.to_reference if referenced else total.to_change(target)
    return None if multiplier is None or not math.isfinite(multiplier) else Fraction(f"{multiplier:.4g}")


@contextmanager
def open_comparison(
    base: str,
    variant: str,
    *,
    reference: str | None = None,
    reference_base: str | None = None,
    onto: str | None = None,
    options: MergeOptions | None = None,
) -> Iterator[Comparison]:
    """Open MODELs to compare ``variant`` with ``base``; only headers are read.

    The files close at the end of the ``with`` block.

    The delta is variant - base, the reference delta ``reference`` - ``reference_base`` (``base`` without it), and ``onto`` the model that the
    delta would be added to (``base`` without it). Raises what `Inputs.model` and `plan_merge` raise, FamilyError for models of
    different families or that do not meet (`arch.meeting`) and UsageError for a model that is compared with itself.
    """
    if base == variant:
        raise UsageError(f'A and B are both "{base}"; name two different models.')
    if reference_base is not None and reference is None:
        raise UsageError("`reference_base` has no `reference` to be subtracted from; name one.")
    pair = None if reference is None else (reference, reference_base or base)
    if pair is not None and pair[0] == pair[1]:
        raise UsageError(f'the reference "{pair[0]}" has no difference to itself; name its base with `reference_base`.')
    names = list(dict.fromkeys((onto or base, variant, base, *(pair or ()))))
    with ExitStack() as stack:
        opened = Inputs(stack)
        inputs = [opened.model(name) for name in names]
        for other in inputs[1:]:
            meeting.check_families(inputs[0], other)
        reference_columns = None if pair is None else (names.index(pair[0]), names.index(pair[1]))
        operands = ComparedModels(tuple(inputs), names.index(base), names.index(variant), 0, reference_columns)
        yield _planned(operands, options or MergeOptions())


def compare(
    comparison: Comparison,
    *,
    multiplier: Fraction | str = Fraction(1),
    target: float = TARGET,
    threads: int | None = None,
    reader: Reader = "auto",
    progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Read the models once and report. With the multiplier "recommended" an eighth of three of them is read once more.

    Rounding is looked at on the elements that `mergetool merge` measures by itself, and its figures are equal to those of that merge on a CPU.
    Memory is about 15 MB a thread. ``progress`` is told of bytes read, from this thread. Raises UsageError for a target that is none, NonFiniteError
    for NaN or infinity in a model, and what reading raises.
    """
    if not 0 < target < 1e6:
        raise UsageError(f"`target` is {target:g}, but a change has a size above 0.")
    asked(threads)
    operands = comparison.operands
    first = Fraction(1) if multiplier == RECOMMENDED else multiplier
    if not isinstance(first, Fraction) or first == 0:
        raise UsageError(f'a multiplier is a number other than 0, or "{RECOMMENDED}", not "{multiplier}".')
    plan = comparison.plan(first)
    chunks = list(_chunks(comparison, plan, merges=multiplier != RECOMMENDED))
    with ThreadPoolExecutor(1, "lineage", give_way) as beside:
        advice = beside.submit(lineage.between, operands.inputs[operands.variant], comparison.base)
        measured = stream(operands, chunks, registers=plan.registers, threads=threads, reader=reader, progress=progress)
    distances = by_part(operands, chunks, measured)
    if multiplier == RECOMMENDED:
        counted = (distance.energies for distance in distances if distance.name not in comparison.excluded)
        first = advised(Energies.total(counted), target, referenced=operands.reference is not None) or first
        plan = comparison.plan(first)
        chunks = [chunk for chunk in _chunks(comparison, plan, sums=False) if chunk.merge]
        measured = stream(operands, chunks, registers=plan.registers, threads=threads, reader=reader)
    moved = (
        ((chunk.merge.tensor.name, chunk.merge.step.part), movement)
        for chunk, (_, movement) in zip(chunks, measured, strict=True)
        if chunk.merge and movement
    )
    movements = Movements.of(moved, sampled=any(not job.sampled for job in _merged(plan)))
    names = [model.name for model in operands.inputs]
    return Report(
        names[operands.base],
        names[operands.variant],
        names[operands.onto],
        None if operands.reference is None else (names[operands.reference[0]], names[operands.reference[1]]),
        tuple(sorted(distances, key=lambda distance: comparison.base.anatomy.family.order(distance.name))),
        comparison.excluded,
        comparison.left_out,
        comparison.base.anatomy.family.group_names(comparison.base.anatomy),
        first,
        comparison.expression(first),
        comparison.options,
        "/".join(sorted({job.tensor.dtype.name for job in _merged(plan)})),
        movements.groups(plan),
        movements.total,
        movements.sampled,
        target,
        (*comparison.unmet, *_confirmed(advice.result(), distances)),
    )


def _confirmed(findings: Sequence[Finding], distances: Sequence[Distance]) -> Iterator[Finding]:
    """The findings of the sample, but for equality where all elements say otherwise."""
    differ = any(distance.energies.delta for distance in distances)
    return (finding for finding in findings if not (differ and finding.text.endswith(lineage.NO_DIFFERENCE)))


def _planned(operands: ComparedModels, options: MergeOptions) -> Comparison:
    """Plan the merge; without an `include` the refiners and text encoders are measured but excluded."""
    base = operands.inputs[operands.base].anatomy
    counted = bool(options.include)
    by_default = not (options.include or options.exclude) and base.family.kept in base.family.group_names(base)
    if by_default:
        options = MergeOptions(exclude=(base.family.kept,), dtype=options.dtype)
    known = tuple(entry.name for entry in models.listing())
    draft = Comparison(operands, options, (), frozenset(), (), known)
    reasons = {step.part: step.reason for tensor in draft.plan(Fraction(1)).tensors for step in tensor.steps}
    shared = comparable([operands.inputs[column] for column in operands.columns])
    wanted = [part for part in shared if (by_default and part not in base.beside) or reasons.get(part) == MERGED]
    left_out = [(part, reasons.get(part, "")) for part in base.parts if part not in wanted]
    return Comparison(
        operands,
        options,
        tuple(wanted),
        frozenset(part for part in wanted if reasons.get(part) != MERGED or (part in base.beside and not counted)),
        tuple(
            (part, reason if reason not in ("", MERGED) else "not in all models in one shape")
            for part, reason in left_out
        ),
        known,
        tuple(Finding("warn", text) for text in _unmet(operands)),
    )


def _unmet(operands: ComparedModels) -> Iterator[str]:
    """Parts of the others without a counterpart in the base, where they are many; refiners count too, since they are measured."""
    base = operands.inputs[operands.base]
    for column in operands.columns:
        if column != operands.base:
            yield from meeting.check(base, operands.inputs[column])


def _chunks(comparison: Comparison, plan: Plan, *, merges: bool = True, sums: bool = True) -> Iterator[Chunk]:
    """The chunks to read, in the order of the output: the engine's own for merged parts, others for the rest."""
    wanted = set(comparison.parts)
    for tensor in plan.tensors:
        for step in tensor.steps:
            if step.part in wanted and step.reason != MERGED:
                yield from cut(comparison.operands, step.part) if sums else ()
    for job in _merged(plan):
        if job.step.part in wanted:
            merge = job if merges and job.sampled else None
            yield Chunk(job.step.part, job.start, job.count, merge, sums)


def _merged(plan: Plan) -> Iterator[Job]:
    return (job for job in jobs(plan) if isinstance(job, Job) and job.step.reason == MERGED)
