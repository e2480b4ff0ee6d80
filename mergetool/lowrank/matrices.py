"""Matrices whose singular values can be had: by their structure where they have one.

A LoRA is two factors, and so is a LoHa (A1 B1) o (A2 B2), wider ones: the products of columns of A1 and A2 and of rows of B1 and B2. The
decomposition of a LoKr, a Kronecker product, is the Kronecker product of two small ones. What is left, whole differences and sums that
are too wide, is one dense float32 matrix at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.lowrank.decomposition import Decomposition, exact_decomposition
from mergetool.lowrank.low_rank import LowRank, RankOf, chosen, sound
from mergetool.lowrank.norms import squared_norm
from mergetool.lowrank.rules import ENERGY, Rule
from mergetool.lowrank.svd import decompose

ROWS = 1024
"""Rows of a dense matrix that are made at a time; in float64, 31 MB of 3840 columns."""


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """``scale * first (x) second`` in float64. Row a * c + b and column i * d + j hold first[a, i] * second[b, j]."""

    first: Tensor
    second: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]."""
        return len(self.first) * len(self.second), self.first.shape[1] * self.second.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Both sides."""
        return self.first, self.second

    @property
    def width(self) -> int:
        """The largest rank that it can have."""
        return min(self.first.shape) * min(self.second.shape)

    def spectrum(self) -> Tensor:
        """The products of the singular values of both."""
        values = [torch.linalg.svdvals(one) for one in (self.first, self.second)]
        together = torch.outer(*values).reshape(-1).sort(descending=True).values * abs(self.scale)
        return self._sound(together)

    def truncated(self, rank: int | RankOf, *, name: str) -> Decomposition:
        """The pairs of directions with the largest products."""
        one, other = (torch.linalg.svd(part, full_matrices=False) for part in (self.first, self.second))
        together = torch.outer(one[1], other[1]).reshape(-1) * abs(self.scale)
        # Stable, so that equal values keep one order: the same file every time.
        values, places = together.sort(descending=True, stable=True)
        kept = chosen(rank, self._sound(values))
        i, j = places[:kept] // len(other[1]), places[:kept] % len(other[1])
        left = torch.einsum("ak,bk->abk", one[0][:, i], other[0][:, j]).reshape(-1, kept)
        right = torch.einsum("ka,kb->kab", one[2][i], other[2][j]).reshape(kept, -1)
        return exact_decomposition(-left if self.scale < 0 else left, values, right, kept, name=name)

    def rows(self, first: int, count: int) -> Tensor:
        """Some of its rows, [count, n], float64."""
        rows = torch.arange(first, first + count)
        left, right = self.first[rows // len(self.second)], self.second[rows % len(self.second)]
        return torch.einsum("ri,rj->rij", left, right).reshape(count, -1) * self.scale

    def _sound(self, values: Tensor) -> Tensor:
        return sound(values, float(values[0]), max(self.shape))

    def low_rank(self) -> LowRank:
        """The same as two factors."""
        return LowRank.of(self.truncated(self.width, name=""))


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A float32 ``matrix`` [m, n] and its ``energy``, the squared Frobenius norm.

    The energy is not finite where a value is not.

    ``sketch`` is the same in bfloat16 where whoever made it has that, for cheap products.
    """

    matrix: Tensor
    energy: float
    sketch: Tensor | None = None

    @classmethod
    def of(cls, values: Tensor) -> Dense:
        """``values`` rounded to float32."""
        matrix = values.float()
        return cls(matrix, squared_norm(matrix))

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The matrix."""
        return (self.matrix,)

    @property
    def width(self) -> int:
        """The shorter side."""
        return min(self.shape)

    def strongest(
        self,
        *,
        name: str,
        rank: int = 0,
        rule: Rule = ENERGY,
        rank_max: int = 0,
        seed: int = 0,
        rows: Tensor | None = None,
        complete: bool = False,
    ) -> Decomposition:
        """Do `svd.decompose`, with the energy and sketch at hand."""
        return decompose(
            self.matrix,
            name=name,
            rank=rank,
            rule=rule,
            rank_max=rank_max,
            seed=seed,
            sketch=self.sketch,
            energy=self.energy,
            rows=rows,
            complete=complete,
        )

    def spectrum(self) -> Tensor:
        """All of its singular values that are not rounding noise of float32."""
        return self.strongest(name="", rule=Rule(threshold=1.0)).singular_values

    def truncated(self, rank: int | RankOf, *, name: str) -> Decomposition:
        """Do `svd.decompose`: within about 0.1 % of the best energy of that rank, certified."""
        if not isinstance(rank, int):
            rank = rank(self.spectrum())
        if rank == 0:  # which `decompose` would take for a rank to be chosen
            m, n = self.shape
            norm = torch.tensor([self.energy**0.5], dtype=torch.float64)
            return exact_decomposition(torch.zeros(m, 0), norm, torch.zeros(0, n), 0, name=name)
        return self.strongest(name=name, rank=rank)

    def rows(self, first: int, count: int) -> Tensor:
        """Some of its rows, [count, n], float64."""
        return self.matrix[first : first + count].double()


Matrix = LowRank | Kronecker | Dense
"""A matrix [m, n] that can be decomposed: all have its ``shape``, the ``tensors`` it is made of and a ``width`` that bounds its rank; ``spectrum`` gives its
singular values, falling, float64, without those that are rounding noise, ``truncated`` its strongest directions, ``rows`` some of its rows in float64."""


def narrow(matrix: Matrix) -> Matrix:
    """``matrix`` as two factors where those are narrow enough to be worked with."""
    if isinstance(matrix, Kronecker) and _are_narrow([matrix.width], matrix.shape):
        return matrix.low_rank()
    return matrix


def total(terms: Sequence[tuple[float, Matrix]]) -> Matrix:
    """The sum of at least one matrix of one shape, each times its strength."""
    shape = terms[0][1].shape
    strength, only = terms[0]
    if len(terms) == 1 and isinstance(only, Kronecker):
        return Kronecker(only.first, only.second, only.scale * strength)
    structured = [(weight, one) for weight, one in terms if not isinstance(one, Dense)]
    # Plain LoRAs stay exact at any width.
    plain = all(isinstance(one, LowRank) and one.width < min(shape) for _, one in terms)
    if plain or _are_narrow([one.width for _, one in terms], shape):
        return LowRank.sum([(weight, one.low_rank()) for weight, one in structured])
    matrix = torch.empty(shape)
    for first in range(0, shape[0], ROWS):
        count = min(ROWS, shape[0] - first)
        tile = torch.stack([one.rows(first, count) * weight for weight, one in terms])
        matrix[first : first + count] = tile.sum(0)
    return Dense.of(matrix)


def _are_narrow(widths: Sequence[int], shape: tuple[int, int]) -> bool:
    """Past a quarter of the shorter side two QRs cost more than the search on the dense matrix."""
    return sum(widths) <= min(shape) // 4
