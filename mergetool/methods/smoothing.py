"""Methods that treat a parameter as a picture, with neighbours and frequencies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Annotated

from mergetool.methods.registry import Range, Site, method
from mergetool.ops.reductions import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

_BELL = [math.exp(-(k**2) / 2) for k in range(5)]
GAUSSIAN = tuple(value / (2 * sum(_BELL) - 1) for value in _BELL)
"""The middle and one side of the Gaussian of standard deviation 1 out to four of them, where scipy cuts it."""


@method(takes="models", least=3, most=3, buffers=lambda _: 1)
def smooth_add_difference(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    alpha: Annotated[float, Range(text="the factor of the smoothed difference")] = 1.0,
) -> Tensor:
    """Add the difference of two models, without lone elements, to a third.

    Formula: x1 + alpha * G(M(x2 - x3)); M the median of every element and its neighbours, 3 along each dimension; G a Gaussian of deviation 1, 9 values along each dimension in turn
    Source: smoothAdd of SuperMerger

    Beyond its edges a parameter goes on as its mirror image, edge elements twice (c b a | a b c), which is scipy's default. Every
    operation is float32, where scipy adds up in float64 and rounds once for each dimension.
    """
    a, b, c = tensors
    difference = b.sub_(c)
    smooth = _medians(difference, c)
    for dimension in range(smooth.ndim):
        smooth = _gaussian(smooth, dimension)
    return a.add_(smooth.mul_(alpha)).add_(difference.mul_(0))  # a median hides infinities


def _medians(values: Tensor, out: Tensor) -> Tensor:
    """The median of each element's neighbourhood, 3 along each dimension, in ``out``."""
    import torch

    if not values.numel() or values.ndim == 0:
        return out.copy_(values)
    height = values.shape[0]
    rows = max(1, BLOCK * height // values.numel())
    for at in range(0, height, rows):
        stop = min(height, at + rows)
        below, above = max(at - 1, 0), min(stop + 1, height)
        block = values[below:above]
        if at == 0:
            block = torch.cat([block[:1], block])
        if stop == height:
            block = torch.cat([block, block[-1:]])
        for dimension in range(1, block.ndim):
            length = block.shape[dimension]
            edges = block.narrow(dimension, 0, 1), block.narrow(dimension, length - 1, 1)
            block = torch.cat([edges[0], block, edges[1]], dim=dimension)
        out[at:stop] = _median(list(_neighbours(block)))
    return out


def _neighbours(block: Tensor) -> Iterator[Tensor]:
    for shift in product(range(3), repeat=block.ndim):
        view = block
        for dimension, start in enumerate(shift):
            view = view.narrow(dimension, start, view.shape[dimension] - 2)
        yield view


# Smith 1996, "Implementing median filters in XC4000E FPGAs": 19 exchanges leave the median of nine in the middle.
_NINE = (
    (1, 2), (4, 5), (7, 8), (0, 1), (3, 4), (6, 7), (1, 2), (4, 5), (7, 8), (0, 3), (5, 8), (4, 7), (3, 6), (1, 4), (2, 5),
    (4, 7), (4, 2), (6, 4), (4, 2),
)  # fmt: skip
_THREE = ((0, 1), (1, 2), (0, 1))


def _median(values: list[Tensor]) -> Tensor:
    """The median of an odd number of tensors, element by element."""
    import torch

    if len(values) > 9:
        return torch.stack(values).median(dim=0).values
    for low, high in _NINE if len(values) == 9 else _THREE:
        values[low], values[high] = (
            torch.minimum(values[low], values[high]),
            torch.maximum(values[low], values[high]),
        )
    return values[len(values) // 2]


def _gaussian(values: Tensor, dimension: int) -> Tensor:
    """The values smoothed along one dimension, in place."""
    import torch

    if not values.numel():
        return values
    length, height = values.shape[dimension], values.shape[0]
    place = torch.arange(-4, length + 4, device=values.device).remainder(2 * length)
    mirrored = torch.where(place < length, place, 2 * length - 1 - place)
    whole = values.index_select(0, mirrored) if dimension == 0 else None
    rows = max(1, BLOCK * height // values.numel())
    for at in range(0, height, rows):
        block = values[at : at + rows]
        padded = block.index_select(dimension, mirrored) if whole is None else whole[at : at + len(block) + 8]
        size = block.shape[dimension]
        torch.mul(padded.narrow(dimension, 4, size), GAUSSIAN[0], out=block)
        for k in range(1, 5):
            pair = padded.narrow(dimension, 4 - k, size) + padded.narrow(dimension, 4 + k, size)
            block.add_(pair.mul_(GAUSSIAN[k]))
    return values


@method(takes="any", least=2, most=2, buffers=lambda _: 3)
def crossover(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    alpha: Annotated[float, Range(0, 1, "the share of the second: 0 is the first, 1 the second")] = 0.5,
    tilt: Annotated[
        float,
        Range(0, 2, "0: the second gives the high frequencies; 1: a weighted sum; 2: the second gives the low ones"),
    ] = 0.0,
) -> Tensor:
    """Take the low frequencies from one and the high ones from the other.

    Formula: x1 + F^-1(h * F(x2 - x1)), F the Fourier transform over all dimensions, f = sqrt(mean of (frequency / highest)**2 over the dimensions), c = 1/tan(pi*tilt/2): h = 1 where f > 1-alpha else 0 for tilt=0; min(1, max(0, c*(f + alpha - 1) + alpha)) up to 1, c*(f - alpha) + alpha in that place above 1; 1 where f < alpha else 0 for tilt=2
    Source: crossover of sd-mecha

    sd-mecha's filter for exactly tilt=2 cuts at 1-alpha, which is not the limit of its filters on either side; its tilts from 2 to 4 are 4-tilt
    here, and it takes a weighted sum where all elements agree to about 1e-5. Devices agree to float32 rounding of the transforms.
    """
    import torch

    a, b = tensors
    if alpha in (0.0, 1.0):
        return tensors[int(alpha)]
    difference = b.sub_(a)
    if tilt == 1 or a.ndim == 0 or not a.numel():
        return a.add_(difference.mul_(alpha))
    spectrum = torch.fft.rfftn(difference)
    frequencies = [_frequencies(length, a) for length in a.shape]
    frequencies[-1] = frequencies[-1][: spectrum.shape[-1]]
    height = spectrum.shape[0]
    rows = max(1, BLOCK * height // spectrum.numel())
    for at in range(0, height, rows):
        squares = frequencies[0][at : at + rows].square()
        for other in frequencies[1:]:
            squares = squares[..., None] + other.square()
        spectrum[at : at + rows] *= _share(squares.div_(a.ndim).sqrt_(), alpha, tilt)
    return a.add_(torch.fft.irfftn(spectrum, s=a.shape))


def _frequencies(length: int, like: Tensor) -> Tensor:
    """The frequencies of a transform of ``length``, over the highest; without sign."""
    import torch

    place = torch.arange(length, device=like.device)
    return torch.minimum(place, length - place).to(like.dtype) / max(1, length // 2)


def _share(frequencies: Tensor, alpha: float, tilt: float) -> Tensor:
    """The share of the second at each frequency."""
    if tilt == 0:
        return (frequencies > 1 - alpha).to(frequencies.dtype)
    if tilt == 2:
        return (frequencies < alpha).to(frequencies.dtype)
    slope = 1 / math.tan(math.pi * tilt / 2)
    return frequencies.sub_(1 - alpha if tilt < 1 else alpha).mul_(slope).add_(alpha).clamp_(0, 1)
