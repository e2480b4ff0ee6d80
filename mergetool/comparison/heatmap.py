"""A heat map in a terminal: values over blocks (rows) and kinds of parameters (columns)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergetool.adapters.describe import block_of
from mergetool.comparison.energies import Distance, Energies

KINDS = ("q", "k", "v", "out", "ffn", "adaln", "norm", "attention")
"""Columns; a part goes to the first of these groups that it is in, or to "other"."""

TALLEST = 200
"""Blocks that are drawn; a file of a stranger may have any number."""

SHADES = "·░▒▓█"
PLAIN_SHADES = ".-+*#"


@dataclass(frozen=True)
class HeatMap:
    """``values`` [blocks, kinds]: NaN where a block has no such part."""

    blocks: tuple[str, ...]
    kinds: tuple[str, ...]
    values: NDArray[np.float64]

    @property
    def range(self) -> tuple[float, float]:
        """The least value above zero and the largest; where there is none, any."""
        positive = self.values[np.isfinite(self.values) & (self.values > 0)]
        return (float(positive.min()), float(positive.max())) if positive.size else (1e-3, 1.0)

    def shades(self, palette: str = SHADES) -> list[str]:
        """Draw every block's row, a character a kind, darker for more.

        The scale is logarithmic. "0" is zero, a blank a missing part.
        """
        low, high = (math.log(end) for end in self.range)
        step = (high - low) / len(palette) or 1.0

        def shade(value: float) -> str:
            if math.isnan(value) or value == 0:
                return "0" if value == 0 else " "
            return palette[min(int((math.log(value) - low) / step), len(palette) - 1)] if value < math.inf else "!"

        return ["".join(shade(float(value)) for value in row) for row in self.values]

    def steps(self, palette: str = SHADES) -> list[tuple[str, float]]:
        """Every shade with the value that it begins at."""
        low, high = self.range
        return [(shade, low * (high / low) ** (i / len(palette))) for i, shade in enumerate(palette)]


def of_distances(distances: Sequence[Distance]) -> HeatMap:
    """The relative distances, in the order of ``distances``."""
    held: dict[tuple[str, str], list[Energies]] = {}
    for distance in distances:
        held.setdefault((block(distance), kind(distance.groups)), []).append(distance.energies)
    blocks = list(dict.fromkeys(block(distance) for distance in distances))[:TALLEST]
    kinds = [each for each in (*KINDS, "other") if any(each == column for _, column in held)]
    values = np.full((len(blocks), len(kinds)), np.nan)
    for (row, column), energies in held.items():
        if row in blocks:
            values[blocks.index(row), kinds.index(column)] = Energies.total(energies).distance
    return HeatMap(tuple(blocks), tuple(kinds), values)


def block(distance: Distance) -> str:
    """The row of a part: its block, or its place outside the blocks."""
    return distance.name.split(".")[0] if distance.groups & {"embedder", "final"} else block_of(distance.name)


def kind(groups: frozenset[str]) -> str:
    """The column of a part."""
    return next((kind for kind in KINDS if kind in groups), "other")
