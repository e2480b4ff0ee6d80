"""Thin out a difference: keep its largest elements, all but the largest few, or random ones.

Everything works in place, and multiplies by 0 what it drops, so that what is not finite stays so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mergetool.ops.reductions import BLOCK, largest, uniform

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 2.0**-24
"""The smallest probability that the random numbers, which are multiples of it, can meet."""


def count(share: float, elements: int) -> int:
    """Count the elements that a share of them makes.

    It is the nearest whole number, but not 0 for a share above 0. int(0.29 * 100) is 28, which is why it is not what is cut off.
    """
    return min(elements, max(round(share * elements), 1)) if share > 0 else 0


def blocks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cut the elements into pieces that stay in the cache, with their places.

    A piece's place is that of its first element.
    """
    flat = values.view(-1)
    for at in range(0, flat.numel(), BLOCK):
        yield at, flat[at : at + BLOCK]


def by_rows(values: Tensor) -> Tensor:
    """View the memory with a row for each index of the first dimension.

    That is an output of a linear map. A tensor without another dimension is one row.
    """
    return values.view(values.shape[0], math.prod(values.shape[1:])) if values.dim() > 1 else values.view(1, -1)


def keep(delta: Tensor, mask: Tensor) -> None:
    """Multiply by a mask, in pieces: torch would make one of float32 of it, of the whole size."""
    for (_, piece), (_, kept) in zip(blocks(delta), blocks(mask), strict=True):
        piece.mul_(kept)


def trim(delta: Tensor, density: float) -> None:
    """Keep the share ``density`` of elements that is largest by magnitude.

    Exactly so many stay; of equal ones the first.
    """
    if density < 1:
        keep(delta, largest(delta, count(density, delta.numel()), magnitude=True))


def trim_outliers(delta: Tensor, density: float, gamma: float) -> None:
    """Keep the share ``density`` that is largest below the share ``gamma``, which goes.

    Where both do not fit, less goes from above.
    """
    elements = delta.numel()
    kept = count(density, elements)
    outliers = min(round(gamma * elements), elements - kept)
    mask = largest(delta, outliers + kept, magnitude=True)
    keep(delta, mask.logical_xor_(largest(delta, outliers, magnitude=True)))


def drop(delta: Tensor, density: float, key: int, *, rescale: bool) -> None:
    """Keep each element with the probability ``density``, divided by it.

    That keeps the mean.
    """
    if density >= 1:
        return
    factor = 1 / max(density, LEAST) if rescale else 1.0
    for at, piece in blocks(delta):
        piece.mul_(uniform(key, piece.shape, piece.device, at) < density).mul_(factor)


def drop_by_rank(delta: Tensor, density: float, epsilon: float, key: int, *, rescale: bool) -> None:
    """Keep each element with a probability that rises with its rank.

    The rank is that of its magnitude in its row; the probability goes from ``density - epsilon`` to ``density + epsilon``.

    The rows are those of ``by_rows``. Where the probabilities would leave 0 to 1, epsilon is less. What is kept is divided by its own probability,
    to keep the mean.
    """
    if density >= 1:
        return
    spread = min(epsilon, density, 1 - density)
    rows = by_rows(delta)
    width = rows.shape[1]
    height = max(1, BLOCK // max(width, 1))
    for top in range(0, len(rows), height):
        piece = rows[top : top + height]
        chances = _ranks(piece).to(delta.dtype)
        chances.mul_(2 * spread / max(width - 1, 1)).add_(density - spread if width > 1 else density).clamp_(min=LEAST)
        piece.mul_(uniform(key, piece.shape, piece.device, top * width) < chances)
        if rescale:
            piece.div_(chances)


def _ranks(rows: Tensor) -> Tensor:
    """The place of each element in its row in the order of its magnitude as float32, from 0; of equal ones the first is below.

    Magnitude and place make one number each, no two alike, so that any sorting gives the same order; that of numpy is three times as fast as argsort.
    """
    import torch

    places = torch.arange(rows.shape[1], device=rows.device)
    keys = rows.abs().float().view(torch.int32).to(torch.int64).mul_(2**32).add_(places)
    if rows.is_cuda:
        keys = keys.sort(dim=1).values
    else:
        keys.numpy().sort(axis=1)
    return torch.empty_like(keys).scatter_(1, keys.remainder_(2**32), places.expand_as(keys))
