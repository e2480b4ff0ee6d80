"""The strongest directions of one matrix, with a certificate of the energy they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Algorithm = Literal["zero", "krylov", "subspace", "gram", "stored", "factors"]


@dataclass(frozen=True, slots=True, eq=False)
class Decomposition:
    """The strongest directions of a delta [m, n]: ``left @ diag(singular_values) @ right``.

    ``left`` [m, r] and ``right`` [r, n] are float32 with orthonormal columns and rows, ``singular_values`` [r] float64,
    falling. The largest entry of each left vector by magnitude is positive (ties: the first). Energies are squared
    Frobenius norms: ``total_energy`` of the delta, ``captured_energy`` of the approximation, ``lost_energy`` of
    their difference.

    ``capped`` says that ``rank_max`` stopped the threshold; ``rank_wanted`` is then the estimated rank it needs, None where
    nothing tells. ``passes`` counts how often the delta was read. ``spectrum`` [min(m, n)] are all singular values, falling,
    where they had to be computed; else None.
    """

    name: str
    left: Tensor
    singular_values: Tensor
    right: Tensor
    total_energy: float
    captured_energy: float
    lost_energy: float
    capped: bool
    rank_wanted: int | None
    method: Algorithm
    passes: int
    spectrum: Tensor | None = None

    @property
    def rank(self) -> int:
        """The number of directions."""
        return len(self.singular_values)

    @property
    def share(self) -> float:
        """The share of the delta's energy that they hold; all of nothing."""
        return self.captured_energy / self.total_energy if self.total_energy else 1.0


def exact_decomposition(left: Tensor, values: Tensor, right: Tensor, rank: int, *, name: str) -> Decomposition:
    """The first ``rank`` directions of a matrix whose singular values are all in ``values``.

    ``left`` is [m, >= rank], ``right`` [>= rank, n].
    """
    left, right = signed(left[:, :rank], right[:rank])
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


def signed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Give directions the signs that a `Decomposition` promises.

    The largest entry of each left vector (ties: the first) becomes positive.
    """
    if not left.numel():
        return left, right
    largest = left.abs().argmax(dim=0, keepdim=True)
    signs = left.gather(0, largest).sign()
    return left * signs, right * signs.T


def zero_decomposition(delta: Tensor, name: str) -> Decomposition:
    """The decomposition of a delta of zeros, or without elements."""
    m, n = delta.shape
    empty = torch.empty(0, dtype=torch.float64)
    return Decomposition(
        name, delta.new_empty(m, 0), empty, delta.new_empty(0, n), 0.0, 0.0, 0.0, False, None, method="zero", passes=1
    )
