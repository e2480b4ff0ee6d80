"""Extraction by directions: find them first, then choose, for a budget or a file of spectra.

With a side file the directions of a matrix are found, or taken from it, and used at once: one pass over the models. A budget
has to see every spectrum before it can choose: one pass finds directions, another projects onto those that were chosen. Between the
two, memory holds the directions, at most about as many bytes as the budget has, and the factors take as many more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from mergetool.adapters.formats import factors_of
from mergetool.arch import Family
from mergetool.difference import budget
from mergetool.difference.directions import EXTRA, Directions, find, from_directions, rule_of, suffice
from mergetool.difference.layer import Result
from mergetool.difference.on_device import Solved
from mergetool.difference.operands import Operand, dense
from mergetool.difference.pairs import Pair
from mergetool.difference.spectra import SideFile
from mergetool.difference.stream import DeltaStream
from mergetool.difference.whole import Whole
from mergetool.lowrank.balanced import balanced, stored_residual
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.promise import ATTEMPTS, stricter
from mergetool.lowrank.rules import Rule
from mergetool.ops.tensors import TORCH
from mergetool.options.differences import DiffOptions

T = TypeVar("T")


def stored_result(
    pair: Pair, options: DiffOptions, family: Family, decompose: Callable[[Rule], Decomposition]
) -> Result:
    """Store the factors of ``pair``. The stored ones meet the threshold themselves where the dtype lets them."""
    rule: Rule | None = rule_of(options)
    for _ in range(ATTEMPTS):
        if rule is None:
            break
        found = decompose(rule)
        stored = balanced(found, TORCH[options.stored])
        residual = stored_residual(found, stored)
        rule = stricter(options.share, found, residual)
    return Result.of(pair, found, stored, residual, family, options.share)


def with_spectra(stream: DeltaStream, options: DiffOptions, side: SideFile) -> Iterator[Solved]:
    """Every pair from directions in ``side``, ranks chosen by rule or fixed.

    Missing directions are added to ``side``.
    """
    family = stream.pairing.base.anatomy.family

    def work(pair: Pair, operand: Operand) -> Result:
        known, delta = side.known.get(pair.name), dense(operand)
        if known is None or not suffice(known, options, pair.shape):
            known = side.add(pair.name, find(pair.name, delta, options, options.rank or options.cap))
        return stored_result(
            pair, options, family, lambda rule: from_directions(pair.name, delta, known, options, rule)
        )

    yield from stream.solved(stream.pairing.pairs, options, work)


@dataclass
class WithinBudget:
    """Every pair, with ranks of least total error in a file of ``options.budget_bytes``.

    ``metadata`` is the file's. Directions are looked for until of no matrix all that are known are kept: only those matrices are
    read again, for twice as many, so that the last pass chooses as if every spectrum were known to its end.
    """

    stream: DeltaStream
    options: DiffOptions
    metadata: Mapping[str, str]
    side: SideFile
    progress: Callable[[int], None] = lambda _: None

    def solve(self) -> Iterator[Solved]:
        """Raises UsageError when nothing fits."""
        yield from self._solved([pair for pair in self.stream.pairing.pairs if pair.reason], _unreachable)
        most = self._first_guess()
        known = self.side.known
        searched = [pair for pair in self.stream.pairing.decomposed if pair.name not in known]
        advance = self.progress
        while True:
            for pair, energy, found in self._solved(searched, partial(self._find, most)):
                advance(self.stream.pairing.nbytes(pair))
                if found is None:
                    yield pair, energy, None  # unchanged, or not finite
            pairs = [pair for pair in self.stream.pairing.decomposed if pair.name in known]
            if not pairs:
                return
            ranks = self._ranks(pairs)
            searched = [pair for pair in pairs if self._is_open(pair, ranks[pair.name])]
            if not searched:
                break
            most |= {pair.name: min(2 * known[pair.name].count, self._cap(pair)) for pair in searched}
            advance = self._only_alive
        yield from self._chosen(pairs, ranks)

    def _solved(
        self, pairs: Sequence[Pair], work: Callable[[Pair, Operand], T]
    ) -> Iterator[tuple[Pair, float, T | Whole | None]]:
        return self.stream.solved(pairs, self.options, work)

    def _find(self, most: Mapping[str, int], pair: Pair, delta: Operand) -> Directions:
        return self.side.add(pair.name, find(pair.name, dense(delta), self.options, most[pair.name]))

    def _only_alive(self, _: int) -> None:
        self.progress(0)

    def _cap(self, pair: Pair) -> int:
        return min(self.options.cap or min(pair.shape), *pair.shape)

    def _first_guess(self) -> dict[str, int]:
        """The number of directions of every matrix to look for at first."""
        pairs = self.stream.pairing.decomposed
        uniform = budget.uniform_rank([pair.shape for pair in pairs], self.options.budget_bytes, self.options.stored)
        guess = max(math.ceil(budget.FIRST_GUESS * uniform), budget.LEAST)
        return {pair.name: min(guess, self._cap(pair)) for pair in pairs}

    def _ranks(self, pairs: Sequence[Pair]) -> dict[str, int]:
        family = self.stream.pairing.base.anatomy.family
        spectra = []
        for pair in pairs:
            known, (down, up) = self.side.known[pair.name], factors_of(family, pair.name)
            usable = known.energies[: min(known.count, self._cap(pair))]
            kernel = pair.base.shape[2:]
            spectra.append(budget.Spectrum(down, up, pair.shape, usable, kernel))
        ranks = budget.ranks_for(spectra, self.options.budget_bytes, self.options.stored, self.metadata)
        return {pair.name: rank for pair, rank in zip(pairs, ranks, strict=True)}

    def _is_open(self, pair: Pair, rank: int) -> bool:
        """True when all known directions of ``pair`` are kept though it has more."""
        known = self.side.known[pair.name]
        return rank == known.count < self._cap(pair) and not known.complete

    def _chosen(self, pairs: Sequence[Pair], ranks: Mapping[str, int]) -> Iterator[Solved]:
        family = self.stream.pairing.base.anatomy.family
        if not self.side.kept:
            for pair in pairs:  # what is not used makes room for the factors
                self.side.known[pair.name] = self.side.known[pair.name].first(ranks[pair.name] + EXTRA)

        def work(pair: Pair, operand: Operand) -> Result:
            known, rank, delta = self.side.known[pair.name], ranks[pair.name], dense(operand)
            result = stored_result(
                pair,
                self.options,
                family,
                lambda rule: from_directions(pair.name, delta, known, self.options, rule, rank),
            )
            capped = rank == self.options.cap and not known.complete
            return replace(result, layer=replace(result.layer, capped=capped))

        for pair in pairs:
            if ranks[pair.name] == 0:
                total = self.side.known[pair.name].total
                yield pair, total, Result.nothing(pair, total)
        yield from self._solved([pair for pair in pairs if ranks[pair.name]], work)


def _unreachable(pair: Pair, delta: Operand) -> None:
    raise AssertionError(f"{pair.name} is not to be decomposed")
