"""A difference kept as two factors, and what can be known of it without multiplying them.

    merged = Factored.sum([(0.8, style), (-0.3, detail)])
    found = merged.truncated(64, name="layers.3.feed_forward.w1.weight")

The singular values of ``up @ down`` are those of the small core R_up @ R_down^T of two QR decompositions (up = Q_up R_up,
down^T = Q_down R_down), so that a 10240 x 3840 matrix of rank 256 costs two thin QRs instead of a decomposition of 39 million
values. All of it is float64: the core's smallest values are right to 1e-16 of its largest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.lowrank.svd import Decomposition

_EPSILON = 2.0**-52

RankOf = Callable[[Tensor], int]
"""How many to keep of falling singular values, float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """``up`` [m, r] @ ``down`` [r, n], both float64 on the CPU. Its width r bounds its rank, which may be less."""

    up: Tensor
    down: Tensor

    @classmethod
    def of(cls, up: Tensor, down: Tensor, scale: float = 1.0) -> Factored:
        """``scale * up @ down`` of factors of any float dtype, widened exactly; the scale goes into ``up``, in float64."""
        wide = up.double()
        return cls(wide if scale == 1 else wide * scale, down.double())

    @classmethod
    def sum(cls, terms: Sequence[tuple[float, Factored]]) -> Factored:
        """The sum of at least one difference of one shape, each times its strength: factors side by side, widths added."""
        if len(terms) == 1 and terms[0][0] == 1:
            return terms[0][1]
        ups = [one.up * strength for strength, one in terms]
        return cls(torch.cat(ups, dim=1), torch.cat([one.down for _, one in terms]))

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n], the shape of the product."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def width(self) -> int:
        """The number of columns of ``up``."""
        return self.up.shape[1]

    def inner(self, other: Factored) -> float:
        """The sum of the products of equal elements, <up down, up' down'> = <up^T up', down down'^T>: r x r' values."""
        return float(((self.up.T @ other.up) * (self.down @ other.down.T)).sum())

    def norm(self) -> float:
        """The Frobenius norm, by the core: right to 1e-16 of the parts' norms even where they cancel, unlike sqrt(inner)."""
        return float(torch.linalg.matrix_norm(_triangle(_qr(self.up)) @ _triangle(_qr(self.down.T)).T))

    def spectrum(self) -> Tensor:
        """Its singular values, falling, float64 [at most r]; those that are rounding noise are left out."""
        core = _triangle(_qr(self.up)) @ _triangle(_qr(self.down.T)).T
        return self._sound(torch.linalg.svdvals(core))

    def truncated(self, rank: int | RankOf, *, name: str) -> Decomposition:
        """Its ``rank`` strongest directions (fewer where it has no more), the closest matrix of that rank there is.

        ``rank`` may be chosen from the spectrum. Vectors are rounded to float32 once, at the end. ``total_energy`` and ``lost_energy`` are those of the whole spectrum, not of
        a capped one.
        """
        of_up, of_down = _qr(self.up), _qr(self.down.T)
        left, values, right = torch.linalg.svd(_triangle(of_up) @ _triangle(of_down).T, full_matrices=False)
        kept = chosen(rank, self._sound(values))
        return decomposition(
            _times_q(of_up, left[:, :kept], self.shape[0]),
            values,
            _times_q(of_down, right[:kept].T, self.shape[1]).T,
            kept,
            name=name,
        )

    def _sound(self, values: Tensor) -> Tensor:
        # Of the sum of the sizes of all rank-one terms, not of the largest value: where terms cancel, all values are noise.
        terms = torch.linalg.vector_norm(self.up, dim=0) @ torch.linalg.vector_norm(self.down, dim=1)
        return sound(values, float(terms), max(*self.shape, self.width))


def chosen(rank: int | RankOf, values: Tensor) -> int:
    """How many of the singular values ``values`` to keep."""
    return min(rank if isinstance(rank, int) else rank(values), len(values))


def sound(values: Tensor, scale: float, size: int) -> Tensor:
    """The falling singular values above the rounding noise of float64: 2^-52 ``size`` times the ``scale`` of what they came from."""
    return values[: int((values > scale * size * _EPSILON).sum())]


def decomposition(left: Tensor, values: Tensor, right: Tensor, rank: int, *, name: str) -> Decomposition:
    """The first ``rank`` directions of ``left`` [m, >= rank] and ``right`` [>= rank, n], of a matrix with all of ``values``.

    The largest entry of each left vector by magnitude is positive (ties: the first), as `Decomposition` promises.
    """
    left, right = left[:, :rank], right[:rank]
    if rank:
        largest = left.abs().argmax(dim=0, keepdim=True)
        signs = left.gather(0, largest).sign()
        left, right = left * signs, right * signs.T
    energies = values.square()
    return Decomposition(
        name,
        left.float().contiguous(),
        values[:rank].clone(),
        right.float().contiguous(),
        total_energy=float(energies.sum()),
        captured_energy=float(energies[:rank].sum()),
        lost_energy=math.fsum(energies[rank:].tolist()),
        capped=False,
        rank_wanted=None,
        method="factors" if rank else "zero",
        passes=1,
    )


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Householder's vectors and their factors; the first are also R, above the diagonal."""
    vectors, tau = torch.geqrf(matrix)
    return vectors, tau


def _triangle(found: tuple[Tensor, Tensor]) -> Tensor:
    """R [min(m, r), r] of a matrix [m, r]."""
    vectors, tau = found
    return vectors[: len(tau)].triu()


def _times_q(found: tuple[Tensor, Tensor], right: Tensor, rows: int) -> Tensor:
    """Q @ right [rows, k], without Q itself: a third of the time at 10240 x 256 and k = 64."""
    vectors, tau = found
    padded = right.new_zeros(rows, right.shape[1])
    padded[: len(right)] = right
    return torch.ormqr(vectors[:, : len(tau)], tau, padded)
