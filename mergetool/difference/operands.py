"""What is decomposed for a pair: the delta of one variant, or what the deltas of two have in common, their union, or one's part orthogonal to the other.

A delta of two checkpoints is dense. That of a LoRA is its change, kept as two factors where it has them, so that the singular
values come from the QR of the factors and no m x n matrix is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergetool.adapters import sources
from mergetool.adapters.rows import ChangeRows
from mergetool.difference.delta import Buffers, Delta, DeltaReader
from mergetool.difference.directions import rule_of
from mergetool.difference.pairs import Pair, Pairing
from mergetool.engine.feeding.values import ValueReader
from mergetool.lowrank import sets
from mergetool.lowrank.factored import Factored
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.sets import NEGLIGIBLE, LowRank
from mergetool.lowrank.svd import Decomposition, decompose, squared_norm, zero_decomposition
from mergetool.options.differences import DiffOptions
from mergetool.recipe.steps import Input

Operand = Delta | LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What of a pair is stored. ``energies`` are the squared Frobenius norms of the variants' deltas, ``shared`` that of their common part."""

    delta: Operand
    energies: tuple[float, ...]
    shared: float | None = None

    @property
    def energy(self) -> float:
        """The squared Frobenius norm of ``delta``."""
        return self.delta.energy if isinstance(self.delta, Delta) else sets.inner(self.delta, self.delta)


class OperandReader:
    """Reads the deltas of a pairing's variants; for one thread."""

    def __init__(self, pairing: Pairing, values: ValueReader) -> None:
        self._models = pairing.variants
        self._readers = [DeltaReader(replace(pairing, variant=model), values) for model in self._models]

    def read(self, pair: Pair, buffers: Sequence[Buffers]) -> tuple[Operand, ...]:
        """The delta of every variant, dense ones in ``buffers``, one each.

        Raises NonFiniteError for NaN or infinity in a LoRA's factors, DataError for a DoRA.
        """
        return tuple(
            self._operand(reader, model, side, room)
            for reader, model, side, room in zip(self._readers, self._models, _sides(pair), buffers, strict=True)
        )

    def energy(self, pair: Pair) -> float:
        """The squared Frobenius norm of the first variant's delta."""
        return 0.0 if pair.variant is pair.base else self._readers[0].energy(pair)

    def _operand(self, reader: DeltaReader, model: Input, pair: Pair, room: Buffers) -> Operand:
        if pair.variant is pair.base:
            rows, columns = pair.shape
            return LowRank(torch.zeros(rows, 0), torch.zeros(0, columns))
        encoding = pair.variant.encoding
        if _is_structured(model, pair) and isinstance(encoding, ChangeRows):
            return _of_lora(sources.source_of(encoding.file, encoding.change))
        return reader.read(pair, room)


def room_for(pairs: Sequence[Pair], models: Sequence[Input]) -> list[Buffers]:
    """Buffers for the largest delta of each of ``models`` that is read densely; most of a LoRA's are not."""
    return [Buffers(elements) for elements in largest_dense(pairs, models)]


def largest_dense(pairs: Sequence[Pair], models: Sequence[Input]) -> list[int]:
    """The elements of those deltas."""
    most = [0] * len(models)
    for pair in pairs:
        if pair.whole or not pair.reason:
            for i, (model, side) in enumerate(zip(models, _sides(pair), strict=True)):
                if not _is_structured(model, side):
                    most[i] = max(most[i], pair.base.numel)
    return most


def subject(pair: Pair, operands: Sequence[Operand], options: DiffOptions) -> Subject:
    """What is stored of a pair: its only delta, or the common part, union or orthogonal part of two, as `lowrank.sets` defines them.

    Dense deltas are first truncated for the common part, as ``options`` say; the others are of the whole ones.
    """
    energies = tuple(one.energy if isinstance(one, Delta) else sets.inner(one, one) for one in operands)
    if len(operands) == 1:
        return Subject(operands[0], energies)
    if options.orthogonal:
        first, second = (one.matrix if isinstance(one, Delta) else one for one in operands)
        rest = as_operand(sets.orthogonal_part(first, second))
        energy = rest.energy if isinstance(rest, Delta) else sets.inner(rest, rest)
        if energy <= NEGLIGIBLE**2 * energies[0]:  # one is a multiple of the other
            rest = LowRank(torch.zeros(pair.shape[0], 0), torch.zeros(0, pair.shape[1]))
        return Subject(rest, energies)
    low = [_truncated(pair, one, options) if isinstance(one, Delta) else one for one in operands]
    shared = sets.common(*low)
    energy = sets.inner(shared, shared)
    if energy <= NEGLIGIBLE**2 * min(energies):  # what float64 leaves of nothing
        shared, energy = LowRank(shared.up[:, :0], shared.down[:0]), 0.0
    if not options.union:
        return Subject(shared, energies, energy)
    first, second = (one.matrix if isinstance(one, Delta) else one for one in operands)
    return Subject(as_operand(sets.united(first, second, shared, options.weights)), energies, energy)


def decomposed(pair: Pair, delta: Operand, options: DiffOptions, share: float | None = None) -> Decomposition:
    """The directions of a delta that ``options`` keep, or that hold ``share`` of its energy.

    Those of a pair of factors come from its whole spectrum, which is exact.
    """
    rule = rule_of(options) if share is None else Rule("energy", share)
    if isinstance(delta, Delta):
        return _dense(pair, delta, options, rule)
    if delta.rank == 0:
        return zero_decomposition(torch.zeros(delta.shape), pair.name)
    wanted = most = 0

    def rank(values: Tensor) -> int:
        nonlocal wanted, most
        most = min(options.rank or options.cap or len(values), len(values))
        wanted = options.rank or rule.rank(values.square().numpy()) or 0
        return min(wanted, most)

    found = Factored.of(delta.up, delta.down).truncated(rank, name=pair.name)
    capped = not options.rank and wanted > most
    return replace(found, capped=capped, rank_wanted=wanted if capped else None)


def dense(delta: Operand) -> Delta:
    """``delta`` as a matrix."""
    if isinstance(delta, Delta):
        return delta
    found = as_operand(delta.dense())
    assert isinstance(found, Delta)
    return found


def as_operand(delta: Tensor | LowRank) -> Operand:
    """What `lowrank.sets` made of deltas, as it is decomposed: a matrix in float32."""
    if isinstance(delta, LowRank):
        return delta
    matrix = delta.float()
    return Delta(matrix, None, squared_norm(matrix))


def _sides(pair: Pair) -> list[Pair]:
    """The pair of the base with each variant."""
    return [pair] if pair.second is None else [pair, replace(pair, variant=pair.second)]


def _is_structured(model: Input, pair: Pair) -> bool:
    """Whether the delta is a LoRA's change of a matrix, which its factors tell; a DoRA's depends on the weight."""
    return model.is_lora and len(pair.base.shape) > 1 and isinstance(pair.variant.encoding, ChangeRows)


def _of_lora(source: sources.Product | sources.Kronecker | sources.Dense) -> Operand:
    if isinstance(source, sources.Kronecker) and source.width <= min(source.shape) // 4:
        source = source.product()
    if isinstance(source, sources.Product):
        return LowRank(source.factors.up, source.factors.down)
    matrix = source.matrix if isinstance(source, sources.Dense) else source.rows(0, source.shape[0]).float()
    return Delta(matrix, None, squared_norm(matrix))


def _truncated(pair: Pair, delta: Delta, options: DiffOptions) -> LowRank:
    if delta.energy == 0:
        return LowRank(delta.matrix[:, :0], delta.matrix[:0])
    return LowRank.of(_dense(pair, delta, options, rule_of(options)))


def _dense(pair: Pair, delta: Delta, options: DiffOptions, rule: Rule) -> Decomposition:
    return decompose(
        delta.matrix,
        name=pair.name,
        rank=options.rank,
        rank_thresh=rule.threshold,
        rank_max=options.cap,
        seed=options.seed,
        sketch=delta.sketch,
        energy=delta.energy,
        rule=rule.name,
    )
