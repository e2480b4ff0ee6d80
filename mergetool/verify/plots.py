"""Plots of a report, as SVG that is part of the page. Same numbers, same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mergetool.verify import distances, images
from mergetool.verify.distances import Distance
from mergetool.verify.pictures import Column

_KINDS = ("q", "k", "v", "out", "ffn", "adaln", "norm", "attention")
"""Columns of the heat map; a parameter goes to the first of these groups that it is in."""

_BLOCK = re.compile(r"(?:[^.]+\.){1,3}?\d+(?=\.)")


def heat_map(found: Sequence[Distance]) -> str:
    """Relative change of every block (rows) by kind of parameter (columns), on a logarithmic scale; grey is no change."""
    blocks = list(dict.fromkeys(_block(distance) for distance in found))
    present = {_kind(distance) for distance in found}
    kinds = [kind for kind in (*_KINDS, "other") if kind in present]
    cells = np.full((len(blocks), len(kinds)), np.nan)
    for row, block in enumerate(blocks):
        for column, kind in enumerate(kinds):
            chosen = [d for d in found if _block(d) == block and _kind(d) == kind]
            cells[row, column] = distances.relative(chosen) if chosen else np.nan
    positive = cells[np.isfinite(cells) & (cells > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1e-3, 1.0)
    figure = Figure((1.6 + 0.62 * len(kinds), 0.7 + 0.24 * len(blocks)), layout="constrained")
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"].with_extremes(under="#d9d9d9", bad="white")
    norm = LogNorm(vmin=low, vmax=max(high, low * 1.01))
    drawn = np.where(cells == 0, low / 2, cells)  # below the scale, where zero itself has no place
    shown = axes.pcolormesh(drawn, cmap=colours, norm=norm, edgecolors="white")
    axes.set_xticks(np.arange(len(kinds)) + 0.5, kinds, fontsize=8)
    axes.set_yticks(np.arange(len(blocks)) + 0.5, blocks, fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    figure.colorbar(shown, label="relative change")
    return _svg(figure)


def _block(distance: Distance) -> str:
    match = None if distance.groups & {"embedder", "final"} else _BLOCK.match(distance.name)
    return match[0] if match else distance.name.split(".")[0]


def _kind(distance: Distance) -> str:
    return next((kind for kind in _KINDS if kind in distance.groups), "other")


def measures(columns: Sequence[Column]) -> str:
    """Every picture's structure, contrast and clipped share, a row of points for each column, with the limits."""
    figure = Figure((7.2, 0.9 + 0.3 * len(columns)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown = (
        ("structure", images.LEAST_STRUCTURE, (0.0, 1.0)),
        ("contrast", images.LEAST_CONTRAST, None),
        ("clipped", images.MOST_CLIPPED, (0.0, 1.0)),
    )
    for axes, (name, limit, bounds) in zip(panels, shown, strict=True):
        for row, column in enumerate(columns):
            values = [getattr(one, name) for one in column.measures]
            spread = np.linspace(-0.18, 0.18, len(values)) if len(values) > 1 else [0.0]
            axes.plot(values, row + np.asarray(spread), ".", markersize=4, color="#2b6cb0", alpha=0.7)
        axes.axvline(limit, color="#c53030", linewidth=1)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(axis="x", alpha=0.25)
        if bounds:
            axes.set_xlim(bounds[0] - 0.03, bounds[1] + 0.03)
    panels[0].set_yticks(range(len(columns)), [column.label for column in columns], fontsize=7)
    panels[0].set_ylim(len(columns) - 0.5, -0.5)
    return _svg(figure)


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "mergetool", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]
