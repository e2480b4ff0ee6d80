"""Sums, dot products and selections over whole tensors, the same on every device.

The number of threads changes nothing either.

Products of float32 are exact in float64. They are added by halving, element by element, so that no library's order of
summation, which differs between devices and versions, can show; what a merge method multiplies by is then the same number
everywhere, and its elements are the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergetool.ops.cpu_rounding import random_bits

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 1 << 18
"""Elements that are added up at a time: 2 MB of float64, which stays in the cache."""

SAMPLE = 1 << 16
"""Elements of a sample for the place of the k-th largest: to half a percent of their number, so that one percent of
all needs a closer look."""


def total(values: Tensor) -> float:
    """The sum of all elements, in float64."""
    flat = values.reshape(-1)
    return _sum([_halved(_exact(flat[at : at + BLOCK])) for at in range(0, flat.numel(), BLOCK)])


def dot(a: Tensor, b: Tensor) -> float:
    """The dot product of all elements of two tensors of one shape, in float64."""
    x, y = a.reshape(-1), b.reshape(-1)
    starts = range(0, x.numel(), BLOCK)
    return _sum([_halved(_exact(x[at : at + BLOCK]).mul_(y[at : at + BLOCK])) for at in starts])


def norm(values: Tensor) -> float:
    """The Frobenius norm, in float64."""
    return math.sqrt(dot(values, values))


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each pair of rows, in float64.

    Rows are the last dimension; the result has the shape of the dimensions before it. A tensor without dimensions is one row of one
    element.
    """
    import torch

    width = max(1, a.shape[-1] if a.ndim else 1)
    x, y = a.reshape(-1, width), b.reshape(-1, width)
    rows = max(1, BLOCK // width)
    sums = [_halved(_exact(x[at : at + rows]).mul_(y[at : at + rows]), dim=1) for at in range(0, len(x), rows)]
    return torch.cat(sums).reshape(a.shape[:-1]) if sums else a.new_zeros(a.shape[:-1], dtype=torch.float64)


def column_dots(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of each pair of columns, in float64.

    Columns are the first dimension; the result has the shape of the dimensions after it. A tensor without dimensions is one column of one
    element.
    """
    import torch

    if not a.numel():
        return a.new_zeros(a.shape[1:], dtype=torch.float64)
    height = a.shape[0] if a.ndim else 1
    x, y = a.reshape(height, -1), b.reshape(height, -1)
    rows = max(1, BLOCK // x.shape[1])
    sums = [_halved(_exact(x[at : at + rows]).mul_(y[at : at + rows])) for at in range(0, height, rows)]
    return _halved(torch.cat(sums)).reshape(a.shape[1:])


def row_norms(values: Tensor) -> Tensor:
    """The Euclidean norm of each row, float64."""
    return row_dots(values, values).sqrt()


def gram(tensors: Sequence[Tensor]) -> list[list[float]]:
    """The dot products of all pairs of some tensors of one shape, in float64."""
    half = [[dot(a, b) for b in tensors[: i + 1]] for i, a in enumerate(tensors)]
    return [[half[max(i, j)][min(i, j)] for j in range(len(half))] for i in range(len(half))]


def combination(tensors: Sequence[Tensor], factors: Sequence[float]) -> Tensor:
    """The sum of factor times tensor, in order, with two roundings a term. It overwrites the tensors."""
    result = tensors[0].mul_(factors[0])
    for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
        result.add_(tensor.mul_(factor))
    return result


def in_blocks(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """Apply ``function`` to the tensors element by element, in place of the first.

    It does so in blocks that stay in the cache.
    """
    flat = [tensor.reshape(-1) for tensor in tensors]
    for at in range(0, flat[0].numel(), BLOCK):
        first, *others = (each[at : at + BLOCK] for each in flat)
        first.copy_(function(first, *others))
    return flat[0].reshape(tensors[0].shape)


def _exact(values: Tensor) -> Tensor:
    """A copy in float64, which may be overwritten."""
    import torch

    return values.to(torch.float64, copy=True)


def _sum(parts: Sequence[Tensor]) -> float:
    """The sum of tensors of one element each, rounded once; NaN or infinite where one of them is."""
    import torch

    numbers = torch.cat(list(parts)).tolist() if parts else []
    return math.fsum(numbers) if all(map(math.isfinite, numbers)) else sum(numbers)


def _halved(values: Tensor, dim: int = 0) -> Tensor:
    """The sums along a dimension, which is kept for ``dim`` 0 and gone for 1; overwrites ``values``, and keeps nothing of their memory."""
    while (length := values.shape[dim]) > 1:
        half = -(-length // 2)
        head = values.narrow(dim, 0, half)
        head.narrow(dim, 0, length - half).add_(values.narrow(dim, half, length - half))
        values = head
    return values.clone() if dim == 0 else values.squeeze(dim).clone()


def kth_largest(values: Tensor, count: int, *, magnitude: bool = False) -> float:
    """Find the ``count``-th largest element, from 1, or magnitude.

    There may be any number of elements; NaN is larger than any number. torch.quantile takes at most 2**24. Raises ValueError for a count
    that is out of range.
    """
    if not 1 <= count <= values.numel():
        raise ValueError(f"there is no {count}-th largest of {values.numel()} elements")
    flat = values.reshape(-1)
    if flat.is_cuda:
        return float((flat.abs() if magnitude else flat).kthvalue(flat.numel() - count + 1).values)
    if flat.numel() > 4 * SAMPLE:
        value = _near(flat, count, magnitude)
        if value is not None:
            return value
    return _partitioned((flat.abs() if magnitude else flat).numpy(), count)


def _partitioned(values: np.ndarray[Any, Any], count: int) -> float:
    at = len(values) - count
    return float(np.partition(values, at)[at])


def _near(flat: Tensor, count: int, magnitude: bool) -> float | None:
    """The same from the few elements near where a sample has it; None where it is not among them, as for structured values."""
    sample = flat[:: flat.numel() // SAMPLE].numpy()
    ordered = np.sort(np.abs(sample) if magnitude else sample)[::-1]
    share = count / flat.numel()
    place, margin = share * len(ordered), 4 * math.sqrt(share * (1 - share) * len(ordered)) + 2
    high = ordered[int(place - margin)] if place > margin else np.inf
    low = ordered[int(place + margin)] if place + margin < len(ordered) else -np.inf
    above, between = 0, []
    for piece in _pieces(flat, magnitude):
        each = piece.numpy()
        below = each <= high
        above += len(each) - int(np.count_nonzero(below))
        between.append(each[below & (each >= low)])
    near = np.concatenate(between)
    return _partitioned(near, count - above) if above < count <= above + len(near) else None


def _pieces(flat: Tensor, magnitude: bool) -> Iterator[Tensor]:
    """The elements or their magnitudes, in blocks."""
    for at in range(0, flat.numel(), BLOCK):
        piece = flat[at : at + BLOCK]
        yield piece.abs() if magnitude else piece


def largest(values: Tensor, count: int, *, magnitude: bool = False) -> Tensor:
    """Mask the ``count`` largest elements.

    They are largest by value or by magnitude; of equal ones the first count. It has the shape of ``values``.

    Every element for a count at least as large as the tensor, none for 0 or less. NaN is larger than any number.
    """
    import torch

    if count <= 0:
        return torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    if count >= values.numel():
        return torch.ones(values.shape, dtype=torch.bool, device=values.device)
    flat = values.reshape(-1)
    threshold = kth_largest(flat, count, magnitude=magnitude)
    unknown = math.isnan(threshold)
    chosen = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    if not unknown:
        for at, piece in enumerate(_pieces(flat, magnitude)):
            chosen[at * BLOCK : at * BLOCK + len(piece)] = (piece <= threshold).logical_not_()
    missing = count - int(chosen.count_nonzero())
    for at, piece in enumerate(_pieces(flat, magnitude)):  # the places of 39 M equal elements would take 315 MB
        if missing == 0:
            break
        places = (piece.isnan() if unknown else piece == threshold).nonzero().reshape(-1)[:missing]
        chosen[at * BLOCK + places] = True
        missing -= len(places)
    return chosen.reshape(values.shape)


def uniform(key: int, shape: torch.Size | tuple[int, ...], device: torch.device, start: int = 0) -> Tensor:
    """Random float32 in [0, 1), multiples of 2**-24, that depend on the key and the place alone.

    They are those of a counter.

    The first is that of place ``start``, so that a tensor's numbers can be had in pieces.
    """
    import torch

    count = math.prod(shape)
    draws = np.empty(count, np.float32)
    bits, scratch = np.empty((2, min(count, BLOCK)), np.uint32)
    for at in range(0, count, BLOCK):
        block = draws[at : at + BLOCK]
        words = bits[: len(block)]
        random_bits(key, start + at, words, scratch[: len(block)])
        words >>= np.uint32(8)
        np.copyto(block, words, casting="same_kind")
        block *= np.float32(2.0**-24)
    return torch.from_numpy(draws).reshape(shape).to(device)
