"""The least total error for a file size: which directions of all matrices to keep.

Leaving a direction out costs s^2 of the squared error, whatever else is kept (Eckart & Young 1936, in every matrix by itself), and
keeping it costs (m + n) values of the stored dtype. So the directions of all matrices are taken in the order of s^2 per byte until
the file is full: no other choice of ranks of the same size has a smaller error, up to the last direction that does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mergetool.adapters.diffusers_header import header
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.header import Header
from mergetool.errors import UsageError
from mergetool.lowrank.rules import Float64

FIRST_GUESS = 1.25
"""Directions to find of every matrix at first, in units of the rank that fills the budget when all have the same."""

LEAST = 8


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One matrix: its factors' names, its shape [m, n] and its strongest ``energies``.

    Energies are squared singular values, falling.

    ``kernel`` is that of a convolution, of whose columns n it is a factor.
    """

    down: str
    up: str
    shape: tuple[int, int]
    energies: Float64
    kernel: tuple[int, ...] = ()

    def cost(self, dtype: DType) -> int:
        """Bytes of one direction."""
        return sum(self.shape) * dtype.itemsize

    @property
    def opening(self) -> int:
        """Bytes that the header needs to name both factors, to about 10."""
        return len(self.down) + len(self.up) + 2 * 64


def uniform_rank(shapes: Sequence[tuple[int, int]], budget: int, dtype: DType) -> float:
    """The rank at which factors of all ``shapes`` fill ``budget`` bytes."""
    return budget / (dtype.itemsize * sum(m + n for m, n in shapes))


def file_size(spectra: Sequence[Spectrum], ranks: Sequence[int], dtype: DType, metadata: Mapping[str, str]) -> int:
    """Bytes of the LoRA's file with these ranks, its header included."""
    entries = []
    for one, rank in zip(spectra, ranks, strict=True):
        if rank:
            inner = one.shape[1] // prod(one.kernel)
            entries += [(one.down, dtype, (rank, inner, *one.kernel))]
            entries += [(one.up, dtype, (one.shape[0], rank, *(1 for _ in one.kernel)))]
    return Header.plan(entries, {**metadata, **header({name: shape for name, _, shape in entries})}).file_size


def ranks_for(spectra: Sequence[Spectrum], budget: int, dtype: DType, metadata: Mapping[str, str]) -> list[int]:
    """Choose every rank, 0 included, for the least error in a file of ``budget`` bytes.

    Raises UsageError when not even one direction fits.
    """
    items = _items(spectra, dtype)

    def size(ranks: Sequence[int]) -> int:
        return file_size(spectra, ranks, dtype, metadata)

    low, high = 0, len(items)  # the first `low` items fit
    while low < high:
        middle = (low + high + 1) // 2
        if size(_counted(items[:middle], len(spectra))) <= budget:
            low = middle
        else:
            high = middle - 1
    ranks = _filled(items, low, spectra, budget, dtype, size)
    if not any(ranks):
        least = size(_counted(items[:1], len(spectra)))
        raise UsageError(f"`budget` is {budget} bytes, but the smallest LoRA that is worth its file has {least}.")
    return ranks


@dataclass(frozen=True, slots=True)
class _Item:
    """``count`` more directions of matrix ``place``."""

    density: float  # energy per byte
    place: int
    count: int


def _items(spectra: Sequence[Spectrum], dtype: DType) -> list[_Item]:
    """The items to add to the file, the best first; the items of one matrix in the order of its directions.

    The first item of a matrix pays for its names in the header: it is as many directions as make that worth most.
    """
    items = []
    for place, one in enumerate(spectra):
        energies = one.energies[one.energies > 0]
        if len(energies) == 0:
            continue
        cost = one.cost(dtype)
        joint = np.cumsum(energies) / (one.opening + cost * np.arange(1, len(energies) + 1))
        first = int(np.argmax(joint)) + 1
        items.append(_Item(float(joint[first - 1]), place, first))
        items += [_Item(float(energy) / cost, place, 1) for energy in energies[first:]]
    return sorted(items, key=lambda item: -item.density)  # stable: equal ones stay in the order of the matrices


def _counted(items: Sequence[_Item], matrices: int) -> list[int]:
    ranks = [0] * matrices
    for item in items:
        ranks[item.place] += item.count
    return ranks


def _filled(
    items: Sequence[_Item],
    taken: int,
    spectra: Sequence[Spectrum],
    budget: int,
    dtype: DType,
    size: Callable[[Sequence[int]], int],
) -> list[int]:
    """The ranks of the first ``taken`` items, and of further ones that fit into the rest of the budget, the best first."""
    ranks = _counted(items[:taken], len(spectra))
    closed: set[int] = set()
    room = budget - (size(ranks) if any(ranks) else 0)
    smallest = min((one.cost(dtype) for one in spectra), default=0)
    for item in items[taken:]:
        if room < smallest:
            break
        if item.place in closed:
            continue
        before = ranks[item.place]
        fits = min(item.count, room // spectra[item.place].cost(dtype))
        for count in range(fits, -1, -1):  # one or two steps: only the header may still be in the way
            ranks[item.place] = before + count
            if count == 0 or (now := size(ranks)) <= budget:
                break
        if count < item.count:
            closed.add(item.place)  # its weaker directions are no smaller
        if count:
            room = budget - now
    return ranks
