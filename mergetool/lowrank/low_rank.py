"""A matrix as the product of two factors, examined without multiplying them.

    merged = LowRank.sum([(0.8, style), (-0.3, detail)])
    strongest = merged.truncated(64, name="layers.3.feed_forward.w1.weight")

The singular values of ``up @ down`` are those of the small core R_up @ R_down^T of two QR decompositions (up = Q_up R_up,
down^T = Q_down R_down), so that a 10240 x 3840 matrix of rank 256 costs two thin QRs instead of a decomposition of 39 million
values. All of it is float64: the core's smallest values are right to 1e-16 of its largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mergetool.lowrank.decomposition import Decomposition, exact_decomposition

_EPSILON = 2.0**-52

RankOf = Callable[[Tensor], int]
"""A function that chooses how many of falling singular values (float64) to keep."""


class ThinSvd(NamedTuple):
    """A thin singular value decomposition in float64, ``values`` falling.

    ``left`` [m, k] has orthonormal columns, ``right`` [k, n] orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return float(self.values.square().sum())


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """``up`` [m, r] @ ``down`` [r, n], on the CPU; its width r, from 0, bounds its rank.

    Factors have any float dtype, as they come from a file or go to one. All arithmetic widens them exactly, to float64.
    """

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        """Raises ValueError for factors that do not fit together."""
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(f"factors of shapes {list(self.up.shape)} and {list(self.down.shape)} have no product")

    @classmethod
    def of(cls, decomposition: Decomposition) -> LowRank:
        """The matrix that ``decomposition`` holds, float64."""
        return cls(decomposition.left.double() * decomposition.singular_values, decomposition.right.double())

    @classmethod
    def scaled(cls, up: Tensor, down: Tensor, scale: float) -> LowRank:
        """``scale * up @ down`` in float64; the scale goes into ``up``."""
        wide = up.double()
        return cls(wide if scale == 1 else wide * scale, down.double())

    @classmethod
    def zeros(cls, shape: Sequence[int]) -> LowRank:
        """A matrix [m, n] of zeros: factors without a column."""
        m, n = shape
        return cls(torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64))

    @classmethod
    def sum(cls, terms: Sequence[tuple[float, LowRank]]) -> LowRank:
        """Add matrices of one shape, each times its weight: factors side by side, widths added.

        There has to be at least one.

        Terms of weight 0 are left out.
        """
        used = [(weight, one.wide()) for weight, one in terms if weight != 0]
        if not used:
            return cls.zeros(terms[0][1].shape)
        if len(used) == 1 and used[0][0] == 1:
            return used[0][1]
        return cls(
            torch.cat([one.up * weight for weight, one in used], dim=1), torch.cat([one.down for _, one in used])
        )

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n], the shape of the product."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def width(self) -> int:
        """The number of columns of ``up``."""
        return self.up.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both factors."""
        return self.up, self.down

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return self.inner(self)

    def wide(self) -> LowRank:
        """The same in float64."""
        return LowRank(self.up.double(), self.down.double())

    def low_rank(self) -> LowRank:
        """Itself."""
        return self

    def dense(self) -> Tensor:
        """The product, [m, n], float64."""
        return self.up.double() @ self.down.double()

    def rows(self, first: int, count: int) -> Tensor:
        """Some rows of the product, [count, n], float64."""
        return self.up[first : first + count].double() @ self.down.double()

    def inner(self, other: LowRank) -> float:
        """The inner product: the sum of the products of equal elements.

        <up down, up' down'> = <up^T up', down down'^T>, of r x r' values.
        """
        mine, theirs = self.wide(), other.wide()
        return float(((mine.up.T @ theirs.up) * (mine.down @ theirs.down.T)).sum())

    def norm(self) -> float:
        """The Frobenius norm, by the core.

        It is right to 1e-16 of the terms' norms even where they cancel, unlike sqrt(energy).
        """
        return float(torch.linalg.matrix_norm(self._core()[0]))

    def spectrum(self) -> Tensor:
        """Its singular values, falling, float64 [at most r], without those that are rounding noise."""
        return self._sound(torch.linalg.svdvals(self._core()[0]))

    def svd(self, rank: int | RankOf | None = None) -> ThinSvd:
        """All singular values, rounding noise included, and the vectors of the first ``rank``.

        Without ``rank`` all vectors.

        ``rank`` may be chosen from those values that are not noise.
        """
        core, of_up, of_down = self._core()
        left, values, right = torch.linalg.svd(core, full_matrices=False)
        if rank is None:  # of all vectors Q itself is as fast
            return ThinSvd(_q(of_up) @ left, values, right @ _q(of_down).T)
        kept = chosen(rank, self._sound(values))
        m, n = self.shape
        return ThinSvd(_times_q(of_up, left[:, :kept], m), values, _times_q(of_down, right[:kept].T, n).T)

    def truncated(self, rank: int | RankOf, *, name: str) -> Decomposition:
        """The ``rank`` strongest directions: the closest matrix of that rank.

        They are fewer where the matrix has no more.

        ``rank`` may be chosen from the spectrum. Vectors are rounded to float32 once, at the end. ``total_energy`` and ``lost_energy`` are
        those of the whole spectrum, not of a capped one.
        """
        left, values, right = self.svd(rank)
        return exact_decomposition(left, values, right, len(right), name=name)

    def _core(self) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The small matrix with the same singular values, and the QRs of ``up`` and of ``down`` transposed."""
        wide = self.wide()
        of_up, of_down = _qr(wide.up), _qr(wide.down.T)
        return _triangle(of_up) @ _triangle(of_down).T, of_up, of_down

    def _sound(self, values: Tensor) -> Tensor:
        # Of the sum of the sizes of all rank-one terms, not of the largest value: where terms cancel, all values are noise.
        wide = self.wide()
        terms = torch.linalg.vector_norm(wide.up, dim=0) @ torch.linalg.vector_norm(wide.down, dim=1)
        return sound(values, float(terms), max(*self.shape, self.width))


def chosen(rank: int | RankOf, values: Tensor) -> int:
    """The number of singular values ``values`` to keep."""
    return min(rank if isinstance(rank, int) else rank(values), len(values))


def sound(values: Tensor, scale: float, size: int) -> Tensor:
    """Keep the falling singular values above float64's rounding noise.

    The noise is 2^-52 times ``size`` times ``scale``, the largest value that they were computed from.
    """
    return values[: int((values > scale * size * _EPSILON).sum())]


def _qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Householder's vectors and their factors; the first are also R, above the diagonal."""
    vectors, tau = torch.geqrf(matrix)
    return vectors, tau


def _triangle(householder: tuple[Tensor, Tensor]) -> Tensor:
    """R [min(m, r), r] of a matrix [m, r]."""
    vectors, tau = householder
    return vectors[: len(tau)].triu()


def _q(householder: tuple[Tensor, Tensor]) -> Tensor:
    """Q [m, min(m, r)] of a matrix [m, r]."""
    vectors, tau = householder
    q: Tensor = torch.linalg.householder_product(vectors[:, : len(tau)], tau)
    return q


def _times_q(householder: tuple[Tensor, Tensor], right: Tensor, rows: int) -> Tensor:
    """Q @ right [rows, k], without Q itself: a third of the time at 10240 x 256 and k = 64."""
    vectors, tau = householder
    padded = right.new_zeros(rows, right.shape[1])
    padded[: len(right)] = right
    return torch.ormqr(vectors[:, : len(tau)], tau, padded)
