"""The norms of a LoRA's changes as a picture. Same numbers, same bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mergetool.adapters.describe import Target, by_block, total
from mergetool.checkpoint.files import write_file
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.targets import TargetClaim
from mergetool.errors import OutputError, UsageError

_KINDS = ("q", "k", "v", "out", "ffn", "adaln", "norm", "attention")
"""Columns; a part goes to the first of these groups that it is in."""

_TALLEST = 200
"""Blocks that are drawn; a file of a stranger may have any number."""


def require_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a picture that could not be written, before the work. Raises OutputError, UsageError for another kind than PNG, BusyError."""
    if path.suffix.lower() != ".png":
        raise UsageError(f'the plot is a PNG file: name it "{path.name}.png".')
    if not path.parent.exists():
        raise OutputError(f'the folder "{path.parent}" does not exist; make it first.')
    TargetClaim.claim(path, 0, "file", overwrite=overwrite, inputs=()).release()


def write(path: Path, targets: Sequence[Target], *, title: str, overwrite: bool = False) -> None:
    """Draw the norm of every block (rows) by kind of parameter (columns) on a logarithmic scale, as a PNG at ``path``.

    White is what the LoRA does not change, grey what it changes by zero. Raises what `write_file` raises.
    """
    write_file(path, _png(targets, title), overwrite=overwrite)


def cells(targets: Sequence[Target]) -> tuple[list[str], list[str], np.ndarray]:
    """Blocks, kinds, and the norm of each, NaN where nothing is changed."""
    blocks = list(by_block(targets))[:_TALLEST]
    kinds = [kind for kind in (*_KINDS, "other") if any(_kind(target) == kind for target in targets)]
    values = np.full((len(blocks), len(kinds)), np.nan)
    for row, (_, held) in enumerate(blocks):
        for column, kind in enumerate(kinds):
            chosen = [target for target in held if _kind(target) == kind]
            if chosen:
                values[row, column] = total(chosen)
    return [block for block, _ in blocks], kinds, values


def _png(targets: Sequence[Target], title: str) -> bytes:
    blocks, kinds, values = cells(targets)
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-3, 1.0)
    with matplotlib.rc_context({"font.family": "sans-serif", "text.parse_math": False}):
        figure = Figure((1.9 + 0.62 * len(kinds), 1.1 + 0.24 * len(blocks)), layout="constrained", dpi=120)
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["viridis"].with_extremes(under="#d9d9d9", bad="white")
        drawn = np.where(values == 0, low / 2, values)  # below the scale, where zero itself has no place
        high = max(high, low * 1.01)
        norm = LogNorm(vmin=low, vmax=high)
        shown = axes.pcolormesh(np.ma.masked_invalid(drawn), cmap=colours, norm=norm, edgecolors="white")
        axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=8)
        axes.set_yticks(np.arange(len(blocks)) + 0.5, [_shown(block) for block in blocks], fontsize=7)
        axes.invert_yaxis()
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.set_xlabel(_shown(title), fontsize=8)
        bar = figure.colorbar(shown, ticks=np.geomspace(low, high, 5), format=lambda value, _: f"{value:.3g}")
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7)
        bar.set_label("norm of the change", fontsize=8)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _shown(name: str) -> str:
    """A name as ASCII, which every font has, and short."""
    plain = quoted(name)[1:-1].encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= 40 else plain[:39] + "..."


def _kind(target: Target) -> str:
    return next((kind for kind in _KINDS if kind in target.groups), "other")
