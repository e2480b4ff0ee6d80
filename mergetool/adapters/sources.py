"""What a LoRA file adds to one matrix, as something whose singular values can be had: by its structure where it has one.

A LoRA is two factors. A LoHa (A1 B1) o (A2 B2) is two wider ones, exactly: the products of columns of A1 and A2 and of rows of
B1 and B2. The decomposition of a LoKr, a Kronecker product, is the Kronecker product of two small ones. What is left, whole
differences and sums that are too wide, is one dense float32 matrix at a time, decomposed as `mergetool diff` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mergetool.adapters.adapter import Change
from mergetool.adapters.reading import LoraFile
from mergetool.adapters.values import dense_rows, factor, low_rank
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError, NonFiniteError
from mergetool.lowrank.factored import Factored, RankOf, chosen, decomposition, sound
from mergetool.lowrank.svd import Decomposition, decompose, squared_norm

ROWS = 1024
"""Rows of a dense matrix that are made at a time; in float64, 31 MB of 3840 columns."""


class Source(Protocol):
    """A matrix [m, n] that can be decomposed."""

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]."""

    def spectrum(self) -> Tensor:
        """Its singular values, falling, float64, without those that are rounding noise."""

    def truncated(self, rank: int | RankOf, *, name: str) -> Decomposition:
        """Its ``rank`` strongest directions, fewer where it has no more; ``rank`` may be chosen from the spectrum."""

    def rows(self, first: int, count: int) -> Tensor:
        """Some of its rows, [count, n], float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A `Factored` as a source: the change of a LoRA or a LoHa, or a sum of such."""

    factors: Factored

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]."""
        return self.factors.shape

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return self.factors.up, self.factors.down

    def spectrum(self) -> Tensor:
        """`Factored.spectrum`."""
        return self.factors.spectrum()

    def truncated(self, rank: int | RankOf, *, name: str) -> Decomposition:
        """`Factored.truncated`."""
        return self.factors.truncated(rank, name=name)

    def rows(self, first: int, count: int) -> Tensor:
        """Some of its rows, [count, n], float64."""
        return self.factors.up[first : first + count] @ self.factors.down


@dataclass(frozen=True, slots=True, eq=False)
class Kronecker:
    """``scale * first (x) second``, float64: row a * c + b and column i * d + j hold first[a, i] * second[b, j]."""

    first: Tensor
    second: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]."""
        return len(self.first) * len(self.second), self.first.shape[1] * self.second.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it is made of."""
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
        return decomposition(-left if self.scale < 0 else left, values, right, kept, name=name)

    def rows(self, first: int, count: int) -> Tensor:
        """Some of its rows, [count, n], float64."""
        rows = torch.arange(first, first + count)
        left, right = self.first[rows // len(self.second)], self.second[rows % len(self.second)]
        return torch.einsum("ri,rj->rij", left, right).reshape(count, -1) * self.scale

    def _sound(self, values: Tensor) -> Tensor:
        return sound(values, float(values[0]), max(self.shape))

    def product(self) -> Product:
        """The same as two factors."""
        found = self.truncated(self.width, name="")
        return Product(Factored(found.left.double() * found.singular_values, found.right.double()))


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A float32 matrix [m, n]."""

    matrix: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """[m, n]."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """What it is made of."""
        return (self.matrix,)

    def spectrum(self) -> Tensor:
        """All of its singular values that are not rounding noise of float32."""
        return decompose(self.matrix, name="", rank_thresh=1.0).singular_values

    def truncated(self, rank: int | RankOf, *, name: str) -> Decomposition:
        """`svd.decompose`: within about 0.1 % of the energy of the best of that rank, the energy certified."""
        if not isinstance(rank, int):
            rank = rank(self.spectrum())
        if rank == 0:  # which `decompose` would take for a rank to be chosen
            m, n = self.shape
            total = torch.tensor([squared_norm(self.matrix) ** 0.5], dtype=torch.float64)
            return decomposition(torch.zeros(m, 0), total, torch.zeros(0, n), 0, name=name)
        return decompose(self.matrix, name=name, rank=rank)

    def rows(self, first: int, count: int) -> Tensor:
        """Some of its rows, [count, n], float64."""
        return self.matrix[first : first + count].double()


def source_of(file: LoraFile, change: Change) -> Product | Kronecker | Dense:
    """The values of a change of a matrix; a convolution's columns are its in * kh * kw.

    Raises DataError for a DoRA, whose change depends on the weight it is added to, and NonFiniteError for NaN or infinity.
    """
    adapter = change.adapter
    if "dora_scale" in adapter.tensors:
        raise DataError(
            f'"{file.name}": {quoted(adapter.module)} is a DoRA, whose change depends on the weight it is added to; bake it into '
            "its model with the program that trained it, and take the difference with `mergetool diff`."
        )
    found = _structured(file, change) or Dense(_dense(file, change))
    if not all(bool(torch.isfinite(part).all()) for part in found.parts):
        raise NonFiniteError(
            f'"{file.name}": the factors of {quoted(adapter.module)} hold NaN or infinity; mend the file, or leave it out.'
        )
    return found


def _dense(file: LoraFile, change: Change) -> Tensor:
    matrix = torch.empty(change.rows, prod(change.adapter.shape[1:]))
    for first in range(0, change.rows, ROWS):
        count = min(ROWS, change.rows - first)
        matrix[first : first + count] = torch.from_numpy(dense_rows(file, change, first, count))
    return matrix


def total(terms: Sequence[tuple[float, Product | Kronecker | Dense]]) -> Source:
    """The sum of at least one source of one shape, each times its strength."""
    shape = terms[0][1].shape
    strength, only = terms[0]
    if len(terms) == 1 and isinstance(only, Kronecker):
        return Kronecker(only.first, only.second, only.scale * strength)
    # Past a quarter of the shorter side two QRs cost more than the search on the dense matrix. Plain LoRAs stay exact at any width.
    widths = [_width(one) for _, one in terms]
    plain = all(isinstance(one, Product) and one.factors.width < min(shape) for _, one in terms)
    if plain or sum(widths) <= min(shape) // 4:
        factors = []
        for strength, one in terms:
            assert not isinstance(one, Dense)
            factors.append((strength, (one.product() if isinstance(one, Kronecker) else one).factors))
        return Product(Factored.sum(factors))
    matrix = torch.empty(shape)
    for first in range(0, shape[0], ROWS):
        count = min(ROWS, shape[0] - first)
        matrix[first : first + count] = torch.stack([one.rows(first, count) * strength for strength, one in terms]).sum(
            0
        )
    return Dense(matrix)


def _width(one: Product | Kronecker | Dense) -> int:
    if isinstance(one, Product):
        return one.factors.width
    return one.width if isinstance(one, Kronecker) else min(one.shape)


def _structured(file: LoraFile, change: Change) -> Product | Kronecker | None:
    """The change by its factors; None for one that has no structure to use."""
    adapter = change.adapter
    match adapter.kind:
        case "lora":
            found = low_rank(file, change, scaled=False)
            assert found is not None
            up, down = (torch.from_numpy(values) for values in found)
            return Product(Factored.of(up, down, adapter.scale))
        case "loha" if "t1" not in adapter.tensors:
            left, right = _hadamard(file, change)
            return Product(Factored(left * adapter.scale, right))
        case "lokr":
            return _kronecker(file, change)
    return None


def _hadamard(file: LoraFile, change: Change) -> tuple[Tensor, Tensor]:
    """The factors of an element-wise product: [rows, r1 * r2] and [r1 * r2, columns]."""
    tensors = change.adapter.tensors
    ups = [_wide(factor(file, tensors[f"w{side}_a"], change.row, change.rows)) for side in "12"]
    downs = [_wide(factor(file, tensors[f"w{side}_b"])) for side in "12"]
    up = torch.einsum("mi,mj->mij", *ups).reshape(change.rows, -1)
    return up, torch.einsum("in,jn->ijn", *downs).reshape(up.shape[1], -1)


def _kronecker(file: LoraFile, change: Change) -> Kronecker | None:
    """The factors of a Kronecker product; None where the wanted rows of a fused one cut through the second, or it is a Tucker core."""
    tensors = change.adapter.tensors
    if "t2" in tensors:
        return None
    first, second = (_side(file, change, side) for side in ("w1", "w2"))
    if change.row % len(second) or change.rows % len(second):
        return None
    start = change.row // len(second)
    return Kronecker(first[start : start + change.rows // len(second)], second, change.adapter.scale)


def _side(file: LoraFile, change: Change, side: str) -> Tensor:
    """One side of a Kronecker product, whole or multiplied, a convolution's kernel among its columns."""
    tensors = change.adapter.tensors
    if side in tensors:
        whole = _wide(factor(file, tensors[side]))
        return whole.reshape(len(whole), -1)
    right = _wide(factor(file, tensors[f"{side}_b"]))
    return _wide(factor(file, tensors[f"{side}_a"])) @ right.reshape(len(right), -1)


def _wide(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    return torch.from_numpy(values).double()
