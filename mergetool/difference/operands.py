"""The matrix to decompose for a pair: one delta, or the common part, union or rest of two.

The rest is one's part orthogonal to the other.

A delta of two checkpoints is dense. That of a LoRA is its change, kept as two factors where it has them, so that the singular
values come from the QR of the factors and no m x n matrix is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergetool.adapters.rows import ChangeRows
from mergetool.adapters.sources import source_of
from mergetool.difference.delta import Buffers, DeltaReader
from mergetool.difference.directions import rule_of
from mergetool.difference.pairs import Pair, Pairing
from mergetool.engine.feeding.values import ValueReader
from mergetool.lowrank import sets
from mergetool.lowrank.decomposition import Decomposition, zero_decomposition
from mergetool.lowrank.low_rank import LowRank
from mergetool.lowrank.matrices import Dense, Kronecker, narrow
from mergetool.lowrank.rules import Rule
from mergetool.options.differences import DiffOptions
from mergetool.recipe.steps import Input

Operand = Dense | LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """The matrix of a pair that is stored.

    ``energies`` are the squared Frobenius norms of the variants' deltas, ``shared`` that of their common part.
    """

    delta: Operand
    energies: tuple[float, ...]
    shared: float | None = None

    @property
    def energy(self) -> float:
        """The squared Frobenius norm of ``delta``."""
        return self.delta.energy


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
            return LowRank.zeros(pair.shape)
        encoding = pair.variant.encoding
        if _is_structured(model, pair) and isinstance(encoding, ChangeRows):
            return _of_lora(encoding)
        return reader.read(pair, room)


def room_for(pairs: Sequence[Pair], models: Sequence[Input]) -> list[Buffers]:
    """Buffers for the largest delta of each of ``models`` that is read densely. Most of a LoRA's are not."""
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
    """Find the matrix to store of a pair: its only delta, or a combination of two.

    `lowrank.sets` defines the common part, union and orthogonal part.

    Dense deltas are first truncated for the common part, as ``options`` say; the others are of the whole ones.
    """
    energies = tuple(one.energy for one in operands)
    if len(operands) == 1:
        return Subject(operands[0], energies)
    first, second = map(values, operands)
    if options.orthogonal:
        rest = as_operand(sets.orthogonal_part(first, second))
        if rest.energy <= sets.NEGLIGIBLE**2 * energies[0]:  # one is a multiple of the other
            rest = LowRank.zeros(pair.shape)
        return Subject(rest, energies)
    shared = sets.common(*(_truncated(pair, one, options) for one in operands))
    if not options.union:
        return Subject(shared, energies, shared.energy)
    return Subject(as_operand(sets.united(first, second, shared, options.weights)), energies, shared.energy)


def decomposed(pair: Pair, delta: Operand, options: DiffOptions, rule: Rule) -> Decomposition:
    """The directions of a delta that ``options`` keep, where they choose a rank by ``rule``.

    Those of a pair of factors come from its whole spectrum, which is exact.
    """
    if isinstance(delta, Dense):
        return delta.strongest(name=pair.name, rank=options.rank, rule=rule, rank_max=options.cap, seed=options.seed)
    if delta.width == 0:
        return zero_decomposition(torch.zeros(delta.shape), pair.name)
    wanted = most = 0

    def rank(values: Tensor) -> int:
        nonlocal wanted, most
        most = min(options.rank or options.cap or len(values), len(values))
        wanted = options.rank or rule.rank(values.square().numpy()) or 0
        return min(wanted, most)

    found = delta.truncated(rank, name=pair.name)
    capped = not options.rank and wanted > most
    return replace(found, capped=capped, rank_wanted=wanted if capped else None)


def dense(delta: Operand) -> Dense:
    """``delta`` as a matrix."""
    return delta if isinstance(delta, Dense) else Dense.of(delta.dense())


def values(operand: Operand) -> Tensor | LowRank:
    """An operand as `lowrank.sets` takes it."""
    return operand.matrix if isinstance(operand, Dense) else operand


def as_operand(delta: Tensor | LowRank) -> Operand:
    """A result of `lowrank.sets` as a matrix to decompose, in float32."""
    return delta if isinstance(delta, LowRank) else Dense.of(delta)


def _sides(pair: Pair) -> list[Pair]:
    """The pair of the base with each variant."""
    return [pair] if pair.second is None else [pair, replace(pair, variant=pair.second)]


def _is_structured(model: Input, pair: Pair) -> bool:
    """Whether the delta is a LoRA's change of a matrix, which its factors tell; a DoRA's depends on the weight."""
    return model.is_lora and len(pair.base.shape) > 1 and isinstance(pair.variant.encoding, ChangeRows)


def _of_lora(rows: ChangeRows) -> Operand:
    change = narrow(source_of(rows.file, rows.change))
    return Dense.of(change.rows(0, change.shape[0])) if isinstance(change, Kronecker) else change


def _truncated(pair: Pair, delta: Operand, options: DiffOptions) -> LowRank:
    if isinstance(delta, LowRank):
        return delta
    if delta.energy == 0:
        return LowRank.zeros(pair.shape)
    return LowRank.of(decomposed(pair, delta, options, rule_of(options)))
