"""Measurements of a picture, and their verdict on the model that made it.

All quantities are of pictures uint8 [height, width, 3] of any size, from numpy alone, and need no reference:

* *structure*: the correlation of the colours of neighbouring tiles, of 16 x 16, along the axis where it is larger (stripes
  are no noise). White noise has none, a picture of something has most of 1.
* *contrast*: the standard deviation of its values, 0 to 127.5. A flat picture has next to none.
* *clipped*: the share of its values at the very ends of the scale, 0 and 255, where a burnt picture lies.
* *roughness*: the mean square of the difference of neighbouring pixels' luminance over twice its variance: 1 for white noise, next to none
  where surfaces are smooth.
* *saturation*: the mean difference of a pixel's largest and smallest colour, 0 to 1.

and between two pictures of one size:

* *colour distance*: total variation distance, 0 to 1, of their histograms over 6 x 6 x 6 colours.
* *structural distance*: 1 - SSIM of their luminance (Wang et al. 2004, 8 x 8 windows), 0 for equal pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

TILES = 16
HISTOGRAM = 6
WINDOW = 8

# Calibrated on the embedded family; docs/explanation/lab.md has the counts of false alarms and misses.
LEAST_STRUCTURE = 0.6
LEAST_CONTRAST = 12.0
MOST_CLIPPED = 0.5
# Of 20 pictures of merges at 20 and at 10 times a right factor all are beyond these three, of 80 right ones none is beyond two of them.
MOST_CONTRAST = 85.0
MOST_EVENLY_CLIPPED = 0.05
MOST_ROUGHNESS = 0.1
MOST_COLOUR_DRIFT = 0.2
MOST_STRUCTURAL_DRIFT = 0.3

LEAST_RANGE = {"structure": 0.1, "contrast": 8.0, "clipped": 0.05, "roughness": 0.02, "saturation": 0.08}
"""The distance from its parents' pictures that a picture may always have, in each measure, however narrow their own range."""

LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, slots=True)
class Measures:
    """The quantities of one picture; see the module."""

    structure: float
    contrast: float
    clipped: float
    roughness: float = 0.0
    saturation: float = 0.0

    @property
    def noise(self) -> bool:
        """Whether neighbouring tiles, or pixels of a glaring picture, share little.

        A glaring picture has values up to both ends of the scale. A merge that goes far too far draws glaring stripes or blocks: its tiles
        have something in common, its pixels little.
        """
        glaring = (
            self.contrast > MOST_CONTRAST and self.clipped > MOST_EVENLY_CLIPPED and self.roughness > MOST_ROUGHNESS
        )
        return (self.structure < LEAST_STRUCTURE or glaring) and not self.collapsed

    @property
    def collapsed(self) -> bool:
        """Whether the picture is flat, or burnt to the ends of the scale."""
        return self.contrast < LEAST_CONTRAST or self.clipped > MOST_CLIPPED


def measure(picture: Pixels) -> Measures:
    """Measure a picture of at least 16 x 16 pixels."""
    values = picture.astype(np.float64)
    variance = float(values.var(axis=(0, 1)).sum())
    tiles = _tiles(values)
    tiles -= tiles.mean(axis=(0, 1))
    return Measures(
        structure=max(_correlation(tiles[1:], tiles[:-1]), _correlation(tiles[:, 1:], tiles[:, :-1])),
        contrast=float(np.sqrt(variance / 3)),
        clipped=float(((picture == 0) | (picture == 255)).mean()),
        roughness=_roughness(values @ LUMINANCE),
        saturation=float((picture.max(axis=2).astype(np.int64) - picture.min(axis=2)).mean() / 255),
    )


def outside(pictures: Sequence[Measures], usual: Sequence[Measures]) -> list[bool]:
    """Tell which ``pictures`` leave the range of ``usual`` in some measure.

    They leave it by more than half of that range and the measure's `LEAST_RANGE`. Other pictures of the same prompts, right ones, stay
    inside: a fine-tune shifts a measure, ruin throws it out.
    """
    ranges = {}
    for name, least in LEAST_RANGE.items():
        values = [getattr(measures, name) for measures in usual]
        room = max(least, (max(values) - min(values)) / 2)
        ranges[name] = min(values) - room, max(values) + room
    return [
        any(not low <= getattr(measures, name) <= high for name, (low, high) in ranges.items()) for measures in pictures
    ]


def colour_distance(one: Pixels, other: Pixels) -> float:
    """The total variation distance of the colour histograms, in 0 to 1.

    It is 0 for equal histograms, 1 for no colour in common.
    """
    return float(np.abs(_histogram(one) - _histogram(other)).sum() / 2)


def structural_distance(one: Pixels, other: Pixels) -> float:
    """1 - mean SSIM over 8 x 8 windows of the luminance. Raises ValueError for pictures of different size."""
    if one.shape != other.shape:
        raise ValueError(f"pictures of one size are compared, not {one.shape} with {other.shape}")
    a, b = _windows(one @ LUMINANCE), _windows(other @ LUMINANCE)
    mean_a, mean_b = a.mean(-1), b.mean(-1)
    covariance = (a * b).mean(-1) - mean_a * mean_b
    spread = a.var(-1) + b.var(-1)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (spread + c2))
    return float(1 - ssim.mean())


def drifted(one: Pixels, other: Pixels) -> bool:
    """Whether two pictures, one made from the other, are no longer the same picture."""
    return colour_distance(one, other) > MOST_COLOUR_DRIFT or structural_distance(one, other) > MOST_STRUCTURAL_DRIFT


def psnr(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio in dB, infinite for equal pictures."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def _tiles(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over 16 x 16 tiles, [16, 16, 3]; the uneven rest is cut off at the right and below."""
    height, width = (side // TILES for side in values.shape[:2])
    cut = values[: height * TILES, : width * TILES]
    means: NDArray[np.float64] = cut.reshape(TILES, height, TILES, width, -1).mean(axis=(1, 3))
    return means


def _roughness(values: NDArray[np.float64]) -> float:
    """The roughness of a picture [height, width]; 0 of a flat one."""
    variance = float(values.var())
    steps = [float(np.square(np.diff(values, axis=axis)).mean()) for axis in (0, 1)]
    return sum(steps) / 4 / variance if variance > 1e-9 else 0.0


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The correlation of values whose mean is taken off already; 0 where one of them does not vary."""
    scale = float(np.sqrt((one * one).sum() * (other * other).sum()))
    return float((one * other).sum()) / scale if scale > 1e-9 else 0.0


def _histogram(picture: Pixels) -> NDArray[np.float64]:
    levels = picture.astype(np.int64) * HISTOGRAM // 256
    index = (levels[..., 0] * HISTOGRAM + levels[..., 1]) * HISTOGRAM + levels[..., 2]
    return np.bincount(index.ravel(), minlength=HISTOGRAM**3) / index.size


def _windows(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Overlapping 8 x 8 windows, every fourth pixel, [n, 64]."""
    windows = np.lib.stride_tricks.sliding_window_view(values, (WINDOW, WINDOW))[::4, ::4]
    return windows.reshape(-1, WINDOW * WINDOW)
