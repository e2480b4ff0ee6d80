"""How much of a sum of LoRAs to keep: all of it, a rank, a rule of `rules`, or what fits into a file."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.header import Header
from mergetool.errors import UsageError
from mergetool.lora.gathering import Module
from mergetool.lora.rules import Rule

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Exact:
    """All of it, by concatenation."""

    def rank_of(self, values: Tensor) -> int:
        """All."""
        return len(values)

    def recipe(self) -> dict[str, Any]:
        """What the metadata says of it."""
        return {}


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same rank for every module, fewer where it has no more."""

    rank: int

    def __post_init__(self) -> None:
        """Raises UsageError for a rank below 1."""
        if self.rank < 1:
            raise UsageError(f"--rank is {self.rank}, but a LoRA has a rank of at least 1.")

    def recipe(self) -> dict[str, Any]:
        """What the metadata says of it."""
        return {"rank": self.rank}


@dataclass(frozen=True, slots=True)
class ByRule:
    """A rank for every module by its own spectrum."""

    rule: Rule

    def rank_of(self, values: Tensor) -> int:
        """How many of the falling singular values to keep."""
        return self.rule.rank(values.square().numpy()) or 0

    def recipe(self) -> dict[str, Any]:
        """What the metadata says of it."""
        return {"rule": self.rule.name} | ({"rank_thresh": self.rule.threshold} if self.rule.name != "knee" else {})


@dataclass(frozen=True, slots=True)
class Budget:
    """The least total error that a file of at most so many bytes can have."""

    size: int

    def recipe(self) -> dict[str, Any]:
        """What the metadata says of it."""
        return {"budget": self.size}


Selection = Exact | Fixed | ByRule | Budget


def ranks_within(
    budget: Budget,
    modules: Sequence[Module],
    spectra: Sequence[Tensor],
    dtype: DType | None,
    metadata: Mapping[str, str],
) -> dict[str, int]:
    """Part -> rank, so that the file, header included, has at most ``budget.size`` bytes.

    Raises UsageError where not even one direction fits.
    """
    energies = [values.square().numpy() for values in spectra]
    costs = [sum(module.matrix) * (dtype or module.dtype).itemsize for module in modules]
    # The header of the largest ranks first: what it leaves is sure to fit. Modules that then get nothing give back their names.
    ranks = [len(found) for found in energies]
    best: list[int] | None = None
    for _ in range(3):
        header = _planned(modules, ranks, dtype, metadata)
        ranks = allocate(energies, costs, budget.size - header.data_start)
        if not any(ranks) or _planned(modules, ranks, dtype, metadata).file_size > budget.size:
            break
        best = ranks
    if best is None:
        raise UsageError(
            f"--budget is {budget.size} bytes, which does not hold one direction of any module beside the header; "
            f"the smallest has {min(costs)}."
        )
    return {module.part: rank for module, rank in zip(modules, best, strict=True)}


def allocate(energies: Sequence[Float64], costs: Sequence[int], room: int) -> list[int]:
    """How many values of each falling spectrum of squares to keep, each of them at the cost of its matrix, within ``room``.

    Those that hold most energy for their bytes come first (ties: the first matrix), over all matrices; by Eckart and Young no other
    choice of the same size leaves a smaller total error, but for what one more direction would have cost.

    Example: ``allocate([[9, 4], [5, 1]], [1, 1], 3)`` keeps ``[2, 1]``.
    """
    ranks = [0] * len(energies)
    best = [(-float(found[0]) / cost, i) for i, (found, cost) in enumerate(zip(energies, costs, strict=True)) if len(found)]
    heapq.heapify(best)
    while best:
        _, i = heapq.heappop(best)
        if costs[i] > room:
            continue
        room -= costs[i]
        ranks[i] += 1
        if ranks[i] < len(energies[i]):
            heapq.heappush(best, (-float(energies[i][ranks[i]]) / costs[i], i))
    return ranks


def _planned(
    modules: Sequence[Module], ranks: Sequence[int], dtype: DType | None, metadata: Mapping[str, str]
) -> Header:
    """The header of a file with these ranks."""
    entries: list[tuple[str, DType, tuple[int, ...]]] = []
    for module, rank in zip(modules, ranks, strict=True):
        if rank:
            stored, kernel = dtype or module.dtype, module.shape[2:]
            entries.append((module.keys.down, stored, (rank, *module.shape[1:])))
            entries.append((module.keys.up, stored, (module.shape[0], rank, *(1 for _ in kernel))))
            if module.keys.always_alpha:
                entries.append((module.keys.alpha, dtypes.F32, ()))
    return Header.plan(entries, metadata)
