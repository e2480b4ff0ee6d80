"""Two LoRAs against each other, matrix by matrix: orthogonal part, common part, overlap.

What these words mean is written in `lowrank.sets`. A change without factors (a whole difference, a LoKr or LoHa of high rank) is looked at by
the directions that hold `DENSE_SHARE` of its energy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor

from mergetool.checkpoint.names import quoted
from mergetool.difference.operands import Operand, values
from mergetool.difference.pairs import Pair, Pairing
from mergetool.difference.stream import DeltaStream
from mergetool.engine.threads import asked
from mergetool.errors import DataError, NonFiniteError
from mergetool.lora.gathering import Addend, GatheredModule, Gathering, total_of
from mergetool.lowrank import sets
from mergetool.lowrank.low_rank import LowRank
from mergetool.lowrank.matrices import Kronecker, Matrix, narrow
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.svd import decompose

DENSE_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """The interference of two LoRAs on one matrix, and both energies.

    `sets.Interference` is of the first with respect to the second.

    All numbers are 0 where only one of them changes it; ``opposing`` is None unless it was asked for.
    """

    name: str
    groups: frozenset[str]
    energies: tuple[float, float]
    cosine: float
    column_share: float
    row_share: float
    both_share: float
    opposing: float | None


def orthogonal(gathering: Gathering) -> Gathering:
    """Take the first LoRA without its component along the second, matrix by matrix.

    That is D1 - <D1, D2> / <D2, D2> D2.

    What it leaves of both can be added up like any sum. Matrices that the first does not change are left out. Raises DataError where
    nothing is left, and what `source_of` raises.
    """
    modules = []
    for module in gathering.modules:
        mine, others = _sides(gathering, module)
        if not mine:
            continue
        addends = mine
        if others:
            along = sets.along(*(_values(total_of(side)) for side in (mine, others)))
            if along:
                addends = (*mine, *(replace(addend, strength=addend.strength * Fraction(-along)) for addend in others))
        modules.append(replace(module, addends=addends))
    if not modules:
        raise DataError(f'"{gathering.terms[0].file.name}" changes no matrix; there is nothing to write.')
    return replace(gathering, modules=tuple(modules))


def both(gathering: Gathering) -> Gathering:
    """The modules that both LoRAs change; the others are listed as left out. Raises DataError where there are none."""
    shared = tuple(module for module in gathering.modules if all(_sides(gathering, module)))
    alone = [module for module in gathering.modules if not all(_sides(gathering, module))]
    if not shared:
        names = " and ".join(f'"{term.file.name}"' for term in gathering.terms)
        raise DataError(f"{names} change no matrix in common; there is nothing to write.")
    left_out = [(module.part, f"only in {module.addends[0].file.name}", None) for module in alone]
    return replace(gathering, modules=shared, left_out=(*gathering.left_out, *left_out))


def common(gathering: Gathering) -> Callable[[GatheredModule], LowRank]:
    """Make a function that gives the common part of a module's LoRAs (`sets.common`)."""

    def derive(module: GatheredModule) -> LowRank:
        first, second = (_strongest(_values(narrow(total_of(side)))) for side in _sides(gathering, module))
        return sets.common(first, second)

    return derive


def scores(
    gathering: Gathering,
    *,
    signs: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Score]:
    """The score of every module of two LoRAs, in file order. ``signs`` asks for ``opposing``, which looks at every element."""
    with ThreadPoolExecutor(asked(threads), "score", torch.set_num_threads, (1,)) as pool:
        for found in pool.map(lambda module: _score(gathering, module, signs), gathering.modules):
            progress(1)
            yield found


def delta_scores(
    pairing: Pairing,
    *,
    signs: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Score]:
    """Score every matrix of two variants' differences to one base, in file order. A variant is a checkpoint or a LoRA.

    ``progress`` gets bytes read. Raises NonFiniteError for a difference that holds NaN or infinity.
    """

    def score(pair: Pair, operands: Sequence[Operand]) -> Score:
        first, second = map(values, operands)
        return _scored(pair.name, pair.groups, first, second, signs)

    for pair, found in DeltaStream(pairing, asked(threads)).each(pairing.decomposed, score):
        assert isinstance(found, Score)
        if not all(map(math.isfinite, found.energies)):
            raise NonFiniteError(f"{quoted(pair.name)} holds NaN or infinity in one of the models; mend the file.")
        progress(pairing.nbytes(pair))
        yield found


def summed(found: Iterable[Score], name: str) -> Score:
    """The score of several modules as one: of the block-diagonal matrix that they would make.

    Shares are weighted by the first's energy, ``cosine`` and ``opposing`` by the product of both norms. The last is a mean, not what all
    elements together would give.
    """
    parts = list(found)
    first, second = (math.fsum(one.energies[i] for one in parts) for i in (0, 1))

    def share(of: Callable[[Score], float]) -> float:
        return math.fsum(of(one) * one.energies[0] for one in parts) / first if first else 0.0

    weights = [math.sqrt(one.energies[0] * one.energies[1]) for one in parts]
    product = math.fsum(one.cosine * weight for one, weight in zip(parts, weights, strict=True))
    whole = math.fsum(weights)
    signed = [one.opposing for one in parts]
    opposing = None
    if all(value is not None for value in signed):
        opposing = math.fsum((value or 0.0) * weight for value, weight in zip(signed, weights, strict=True))
        opposing = opposing / whole if whole else 0.0
    return Score(
        name,
        frozenset(),
        (first, second),
        product / math.sqrt(first * second) if first and second else 0.0,
        share(lambda one: one.column_share),
        share(lambda one: one.row_share),
        share(lambda one: one.both_share),
        opposing,
    )


def _sides(gathering: Gathering, module: GatheredModule) -> tuple[tuple[Addend, ...], tuple[Addend, ...]]:
    """The addends of the first LoRA, and those of the second."""
    first = gathering.terms[0].file
    mine = tuple(addend for addend in module.addends if addend.file is first)
    return mine, tuple(addend for addend in module.addends if addend.file is not first)


def _score(gathering: Gathering, module: GatheredModule, signs: bool) -> Score:
    first, second = (_values(narrow(total_of(side))) if side else None for side in _sides(gathering, module))
    return _scored(module.part, module.groups, first, second, signs)


def _scored(
    name: str, groups: frozenset[str], first: LowRank | Tensor | None, second: LowRank | Tensor | None, signs: bool
) -> Score:
    energies = [sets.inner(one, one) if one is not None else 0.0 for one in (first, second)]
    if first is None or second is None or not all(0 < energy < math.inf for energy in energies):
        nothing = 0.0 if signs else None
        return Score(name, groups, (energies[0], energies[1]), 0.0, 0.0, 0.0, 0.0, nothing)
    interference = sets.interference(_strongest(first), _strongest(second), signs=signs)
    norms = math.sqrt(energies[0] * energies[1])
    return Score(
        name,
        groups,
        (energies[0], energies[1]),
        sets.inner(first, second) / norms if norms else 0.0,
        interference.column_share,
        interference.row_share,
        interference.both_share,
        interference.opposing,
    )


def _values(matrix: Matrix) -> LowRank | Tensor:
    """A matrix as `sets` takes it."""
    if isinstance(matrix, Kronecker):
        return matrix.rows(0, matrix.shape[0])
    return values(matrix)


def _strongest(delta: LowRank | Tensor) -> LowRank:
    """A delta by its directions."""
    if isinstance(delta, LowRank):
        return delta
    return LowRank.of(decompose(delta.float(), name="", rule=Rule(threshold=DENSE_SHARE)))
