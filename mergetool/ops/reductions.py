"""Sums, dot products and selections over whole tensors, the same on every device and any number of threads.

Products of float32 are exact in float64. They are added by halving, element by element, so that no library's order of
summation, which differs between devices and versions, can show; what a merge method multiplies by is then the same number
everywhere, and its elements are the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mergetool.ops.cpu_rounding import random_bits

BLOCK = 1 << 18
"""Elements that are added up at a time: 2 MB of float64, which stays in the cache."""

SAMPLE = 1 << 16
"""Elements that say where the k-th largest about is: to half a percent of their number, so that one percent of all is sorted."""


def total(values: Tensor) -> float:
    """The sum of all elements, in float64."""
    flat = values.reshape(-1)
    sums = [_halved(flat[at : at + BLOCK].to(torch.float64)) for at in range(0, flat.numel(), BLOCK)]
    return _added(sums)


def dot(a: Tensor, b: Tensor) -> float:
    """The dot product of all elements of two tensors of one shape, in float64."""
    x, y = a.reshape(-1), b.reshape(-1)
    sums = []
    for at in range(0, x.numel(), BLOCK):
        product = x[at : at + BLOCK].to(torch.float64)
        sums.append(_halved(product.mul_(y[at : at + BLOCK])))
    return _added(sums)


def norm(values: Tensor) -> float:
    """The Frobenius norm, in float64."""
    return math.sqrt(dot(values, values))


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each pair of rows (the last dimension), float64, of the shape of the dimensions before it."""
    width = max(1, a.shape[-1])
    x, y = a.reshape(-1, width), b.reshape(-1, width)
    rows = max(1, BLOCK // width)
    sums = [
        _halved(x[at : at + rows].to(torch.float64).mul_(y[at : at + rows]), dim=1) for at in range(0, len(x), rows)
    ]
    return torch.cat(sums).reshape(a.shape[:-1]) if sums else torch.zeros(a.shape[:-1], dtype=torch.float64)


def row_norms(values: Tensor) -> Tensor:
    """The Euclidean norm of each row, float64."""
    return row_dots(values, values).sqrt()


def _added(sums: Sequence[Tensor]) -> float:
    """The sum of the blocks' sums, correctly rounded; what is not finite stays so, where fsum would raise for inf and -inf."""
    values = torch.cat(list(sums)).tolist() if sums else []
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _halved(values: Tensor, dim: int = 0) -> Tensor:
    """The sums along a dimension, which is kept for ``dim`` 0 and gone for 1; overwrites ``values``, and leaves it no reason to stay in memory."""
    while (length := values.shape[dim]) > 1:
        half = -(-length // 2)
        head = values.narrow(dim, 0, half)
        head.narrow(dim, 0, length - half).add_(values.narrow(dim, half, length - half))
        values = head
    return values.clone() if dim == 0 else values.squeeze(dim).clone()


def kth_largest(values: Tensor, count: int, *, magnitude: bool = False) -> float:
    """The ``count``-th largest element (from 1) of any number of them, or of their magnitudes.

    torch.quantile takes at most 2**24 elements. Raises ValueError for a count that is out of range.
    """
    if not 1 <= count <= values.numel():
        raise ValueError(f"there is no {count}-th largest of {values.numel()} elements")
    flat = values.reshape(-1)
    if flat.is_cuda:
        return float((flat.abs() if magnitude else flat).kthvalue(flat.numel() - count + 1).values)
    if flat.numel() > 4 * SAMPLE:
        found = _near(flat, count, magnitude)
        if found is not None:
            return found
    return _partitioned((flat.abs() if magnitude else flat).numpy(), count)


def _partitioned(values: np.ndarray[Any, Any], count: int) -> float:
    at = len(values) - count
    return float(np.partition(values, at)[at])


def _near(flat: Tensor, count: int, magnitude: bool) -> float | None:
    """The same from the few elements near where a sample has it, in a third of the time; None where it is not among them."""
    sample = flat[:: flat.numel() // SAMPLE].numpy()
    ordered = np.sort(np.abs(sample) if magnitude else sample)[::-1]
    share = count / flat.numel()
    place, margin = share * len(ordered), 4 * math.sqrt(share * (1 - share) * len(ordered)) + 2
    high = ordered[int(place - margin)] if place > margin else np.inf
    low = ordered[int(place + margin)] if place + margin < len(ordered) else -np.inf
    above, between = 0, []
    for piece in _pieces(flat, magnitude):
        each = piece.numpy()
        above += np.count_nonzero(each > high)
        between.append(each[(each <= high) & (each >= low)])
    near = np.concatenate(between)
    return _partitioned(near, count - above) if above < count <= above + len(near) else None


def _pieces(flat: Tensor, magnitude: bool) -> Iterator[Tensor]:
    """Blocks of the elements or of their magnitudes; on a GPU all at once."""
    step = max(1, flat.numel()) if flat.is_cuda else BLOCK
    for at in range(0, flat.numel(), step):
        piece = flat[at : at + step]
        yield piece.abs() if magnitude else piece


def largest(values: Tensor, count: int, *, magnitude: bool = False) -> Tensor:
    """A mask of the ``count`` elements that are largest, or largest by magnitude, of the shape of ``values``.

    Exactly so many; of equal ones the first. Every element for a count at least as large as the tensor, none for 0 or less.
    """
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    if count >= values.numel():
        return torch.ones_like(values, dtype=torch.bool)
    threshold = kth_largest(values, count, magnitude=magnitude)
    flat = values.reshape(-1)
    chosen = torch.cat([piece > threshold for piece in _pieces(flat, magnitude)])
    missing, start = count - int(chosen.count_nonzero()), 0
    for piece in _pieces(flat, magnitude):
        if missing <= 0:
            break
        equal = (piece == threshold).nonzero().reshape(-1)[:missing]
        chosen[start + equal] = True
        missing, start = missing - len(equal), start + len(piece)
    return chosen.reshape(values.shape)


def uniform(key: int, shape: torch.Size | tuple[int, ...], device: torch.device, start: int = 0) -> Tensor:
    """Random numbers in [0, 1), multiples of 2**-24, float32: those of a counter, which depend on the key and the place alone.

    The first is that of place ``start``, so that a tensor's numbers can be had in pieces.
    """
    count = math.prod(shape)
    found, scratch = np.empty(count, np.uint32), np.empty(min(count, BLOCK), np.uint32)
    for at in range(0, count, BLOCK):
        size = min(BLOCK, count - at)
        random_bits(key, start + at, found[at : at + size], scratch[:size])
    found >>= np.uint32(8)
    draws = found.astype(np.float32)
    draws *= np.float32(2.0**-24)
    return torch.from_numpy(draws).reshape(shape).to(device)
