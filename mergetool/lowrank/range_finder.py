"""Choose the directions of a delta to keep: a cheap search, then one float32 projection.

The projection certifies the choice.

Everything works on a matrix whose largest value is near 1 (see lowrank.svd), with energies = squared singular values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.lowrank.krylov import BlockKrylov, Products, orthonormal_rows
from mergetool.lowrank.tail import rank_for_energy

CAP_TOLERANCE = 7e-4
"""The least share of all energy to expect from a search at a fixed rank or at the cap; below it the search ends."""

SLACK = 0.01
"""A threshold's rank may exceed the fewest possible by this share (none below 100)."""

LARGEST_BASIS = 0.4
"""Share of the short side a Krylov basis may fill before the whole spectrum is cheaper."""

BASIS_PER_RANK = 2.5
"""Basis size, in units of the rank, at which the directions of a flat spectrum have settled."""

REPEATED = 0.01
"""Squared singular values closer than this (relative) may be one repeated value. In noise, 32 neighbours span 0.08."""

ZERO = 2.0**-20
"""Singular values below this share of the largest are rounding noise of a float32 matrix, not directions."""

_POLISHES = 4  # float32 power steps at most; each costs two products, and the first leaves 1e-8 to decide


@dataclass(frozen=True, slots=True)
class Goal:
    """Reach energy ``target`` with the fewest directions, at most ``most``. Without a target: exactly ``most``."""

    total: float
    target: float | None
    most: int

    def fewest(self, energies: Tensor) -> int | None:
        """The fewest of the falling ``energies`` [k] that reach the target. None if all ``most`` do not."""
        if self.target is None:
            return None
        reached = (energies[: self.most].cumsum(0) >= self.target).nonzero()
        return int(reached[0]) + 1 if len(reached) else None

    def refuted(self, rank: int) -> int:
        """The largest rank that must be shown to miss the target for ``rank`` to be the answer."""
        return math.ceil(rank / (1 + SLACK)) - 1


@dataclass(frozen=True, slots=True)
class Projection:
    """A delta A [long, short] projected onto ``rows``: A rows^T rows = left diag(values) right.

    ``left`` [long, k] and ``right`` [k, short] float32 with orthonormal columns and rows, ``energies`` [k] float64
    the squared ``values``, falling. The energies are those of a float32 product, summed in float64.
    """

    left: Tensor
    energies: Tensor
    right: Tensor


def project(products: Products, rows: Tensor) -> Projection:
    """The exact singular value decomposition of A rows^T rows. ``rows`` [k, short] are orthonormal, float64."""
    image = products.image(rows)
    exact = image.double()
    energies, turn = torch.linalg.eigh(exact.T @ exact)
    energies, turn = energies.flip(0).clamp_min_(0.0), turn.flip(1)
    kept = int((energies > energies[0] * ZERO**2).sum())
    energies, turn = energies[:kept], turn[:, :kept]
    turned = turn / energies.sqrt()
    # Rounding to float32 is magnified by the ratio of the largest to the smallest singular value.
    steep = kept > 0 and float(energies[-1]) < 1e-3 * float(energies[0])
    left = (exact @ turned).float() if steep else image @ turned.float()
    return Projection(left, energies, turn.T.float() @ rows.float())


def truncate(projection: Projection, rank: int) -> Projection:
    return Projection(projection.left[:, :rank], projection.energies[:rank], projection.right[:rank])


class Search:
    """Grows a Krylov basis until more of it would not change the answer to ``goal``.

    ``advance`` returns how many directions to certify, or None when the goal needs so many of them that the whole
    spectrum is cheaper. ``doubt`` is the energy that those directions may still miss.
    """

    def __init__(self, products: Products, goal: Goal, generator: torch.Generator) -> None:
        self.krylov = BlockKrylov(products, generator)
        self.goal = goal
        self._limit = int(LARGEST_BASIS * products.short)
        self._shape = (products.long, products.short)
        self._history: list[Tensor] = []
        self._noise = goal.total * products.cheap_error
        self._still = goal.total * products.cheap_rise
        self.doubt = math.inf
        self.extra = 2

    def advance(self) -> int | None:
        if self.goal.target is None and self._too_many(self.goal.most):
            return None
        while True:
            width = self._width()
            if width is None:
                return None
            self.krylov.expand(width, fresh=width // 2 if self._repeated() else 0)
            self._history.append(self.krylov.energies)
            count = self._answer()
            if count is not None:
                return count

    def _too_many(self, rank: int) -> bool:
        return BASIS_PER_RANK * rank > self._limit

    def _width(self) -> int | None:
        """Size of the next block: a quarter of the rank that seems needed, 32 to 256; None: too many needed."""
        goal, size = self.goal, self.krylov.size
        wanted = goal.most
        if goal.target is not None:
            wanted = min(wanted, goal.fewest(self.krylov.energies) or self._estimate(goal.target))
            # A small basis knows too little of the tail to give up on, or to leap by, its estimate.
            if len(self._history) >= 4 and self._too_many(wanted):
                return None
            wanted = min(wanted, 4 * size // 3)
        if size >= self._limit:
            return None
        width = 16 * math.ceil(min(max(wanted / 4, 32), 256) / 16)
        return min(width, self._limit - size)

    def _estimate(self, target: float) -> int:
        """The rank that ``target`` seems to need, from the stronger half of the basis: the weaker is still rising."""
        energies = self.krylov.energies
        if len(energies) == 0:
            return 1
        return rank_for_energy(energies[: (len(energies) + 1) // 2].numpy(), self.goal.total, target, self._shape)[1]

    def _answer(self) -> int | None:
        """The number of directions to certify, once growing the basis would not change the outcome."""
        goal, energies = self.goal, self.krylov.energies
        rank = goal.fewest(energies)
        if rank is not None:
            refuted = goal.refuted(rank)
            self.doubt = self._missing(refuted)
            assert goal.target is not None
            margin = goal.target - float(energies[:refuted].sum())
            if self.doubt > max(margin / 2, self._still):
                return None
            return min(rank + max(self.extra, rank // 50), goal.most, len(energies))
        if len(energies) < goal.most:
            # Next to nothing left outside: the certificate will tell whether the delta has any more directions.
            return len(energies) if goal.total - float(energies.sum()) <= self._noise else None
        self.doubt = self._missing(goal.most)
        if self.doubt > CAP_TOLERANCE * goal.total:
            return None
        if goal.target is not None:
            margin = goal.target - float(energies[: goal.most].sum())
            if self.doubt > max(margin, self._still):
                return None
        return goal.most

    def _repeated(self) -> bool:
        """True if some value has so many copies that more may be hidden, and random directions must bring them in.

        A Krylov space holds no more copies of a repeated value than its first block is wide.
        """
        energies = self.krylov.energies
        values = energies[energies > 1e-3 * energies[:1]]
        copies = torch.searchsorted(-values, -values * (1 - REPEATED), right=True) - torch.arange(len(values))
        return bool(self._history) and bool((copies >= len(self._history[0])).any())

    def _missing(self, count: int) -> float:
        """Estimate of the energy the best ``count`` directions hold beyond the best ``count`` of the basis.

        Extrapolates the gains of the last two expansions as a geometric series, half as much again to be safe:
        in flat noise, the slowest case, the true figure was 1.0 to 1.3 times the plain series.
        """
        if count == 0:
            return 0.0
        left = self.goal.total - float(self.krylov.energies[:count].sum())
        if len(self._history) < 3 or len(self._history[-3]) < count:
            return max(left, 0.0)
        first, second, third = (float(energies[:count].sum()) for energies in self._history[-3:])
        gain = third - second
        if gain <= 0.0:
            return 0.0
        ratio = min(gain / max(second - first, gain), 0.95)
        return min(1.5 * gain * ratio / (1 - ratio), max(left, 0.0))


def certify(products: Products, rows: Tensor, goal: Goal, doubt: float) -> Projection:
    """Project onto ``rows``, and refine them by float32 power steps where they are too coarse.

    The cheap products made them so.

    That is where one direction fewer would miss the target by less energy than the rows may be missing (at first
    ``doubt``), and where so little is left outside that the error of the cheap products shows in it. Returns all
    directions of ``rows`` that are not rounding noise.
    """
    projection = project(products, rows)
    coarse = products.cheap_error * goal.total
    for step in range(_POLISHES):
        rank = goal.fewest(projection.energies)
        if rank is None or goal.target is None:
            break
        refuted = goal.refuted(rank)
        before = float(projection.energies[:refuted].sum())
        if step == 0 and refuted:
            # The energy in the row space of delta^T left bounds from below what these directions still miss.
            gain = float(products.cheap_back(projection.left[:, :refuted]).square().sum()) - before
            doubt = max(doubt, 3 * gain, coarse)
        if goal.target - before > doubt:
            break
        projection, coarse = _refined(products, projection), 0.0
        doubt = 3 * max(float(projection.energies[:refuted].sum()) - before, 0.0)
    kept = goal.fewest(projection.energies) or goal.most
    if goal.total - float(projection.energies[:kept].sum()) < 2 * coarse:
        projection = _refined(products, projection)
    return projection


def _refined(products: Products, projection: Projection) -> Projection:
    return project(products, orthonormal_rows(products.back(projection.left)))


def whole_spectrum(products: Products, goal: Goal) -> Projection:
    """The wanted directions from the eigenvectors of the float64 Gram matrix of the short side.

    Cubic in the short side, whatever the rank: about 10 s for 10240 x 3840, where torch.linalg.svd takes 14 to 20.
    """
    energies, rows = spectrum(products)
    rank = goal.fewest(energies) or goal.most
    # One more than needed: float32 projection may take 1e-9 of the energy away again.
    return strongest_of(products, energies, rows, min(rank + 1, goal.most))


def spectrum(products: Products) -> tuple[Tensor, Tensor]:
    """All squared singular values and their directions, from the Gram matrix.

    Values are [short] float64, falling; directions are the rows of [short, short].

    On the device of the delta. An error of 2^-52 of the largest energy is one of 1.5e-8 of the largest singular value.
    """
    matrix, short = products.delta, products.short
    gram = torch.zeros(short, short, dtype=torch.float64, device=matrix.device)
    for part in torch.split(matrix, 1024, dim=0 if products.tall else 1):
        exact = part.double()
        gram += exact.T @ exact if products.tall else exact @ exact.T
    products.passes += 1
    energies, vectors = torch.linalg.eigh(gram)
    return energies.flip(0).clamp_min_(0.0), vectors.flip(1).T


def strongest_of(products: Products, energies: Tensor, rows: Tensor, rank: int) -> Projection:
    """The projection onto the first ``rank`` of ``rows``. They are fewer where ``energies`` are rounding noise."""
    rows = rows[: min(rank, int((energies > energies[0] * ZERO**2).sum()))]
    image = products.image(rows)
    energies, order = image.double().square().sum(0).sort(descending=True, stable=True)
    left = image[:, order].double() / energies.sqrt()
    return Projection(left.float(), energies, rows[order].float())
