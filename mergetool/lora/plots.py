"""The norms of a LoRA's changes as a picture. Same numbers, same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mergetool.adapters.describe import ChangedPart, by_block, total
from mergetool.comparison import plots
from mergetool.comparison.heatmap import KINDS, TALLEST, HeatMap, kind
from mergetool.comparison.plots import require_target

__all__ = ["cells", "require_target", "write"]


def write(path: Path, targets: Sequence[ChangedPart], *, title: str, overwrite: bool = False) -> None:
    """Draw the norm of every block (rows) by kind of parameter (columns), as a PNG at ``path``.

    The scale is logarithmic.

    White is what the LoRA does not change, grey what it changes by zero. Raises what `write_file` raises.
    """
    plots.write_png(path, cells(targets), label="norm of the change", title=title, overwrite=overwrite)


def cells(targets: Sequence[ChangedPart]) -> HeatMap:
    """The norm of every block by kind, NaN where nothing is changed."""
    blocks = list(by_block(targets))[:TALLEST]
    kinds = [each for each in (*KINDS, "other") if any(kind(target.groups) == each for target in targets)]
    values = np.full((len(blocks), len(kinds)), np.nan)
    for row, (_, held) in enumerate(blocks):
        for column, each in enumerate(kinds):
            chosen = [target for target in held if kind(target.groups) == each]
            if chosen:
                values[row, column] = total(chosen)
    return HeatMap(tuple(block for block, _ in blocks), tuple(kinds), values)
