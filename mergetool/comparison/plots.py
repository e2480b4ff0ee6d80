"""Heat maps as pictures. Same numbers, same bytes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mergetool.checkpoint.files import write_file
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.targets import TargetClaim, require_folder
from mergetool.comparison.heatmap import HeatMap
from mergetool.errors import UsageError

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "text.parse_math": False,
    "svg.hashsalt": "mergetool",
    "svg.fonttype": "none",
}


def require_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a picture that could not be written, before the work. Raises OutputError, UsageError for another kind than PNG, BusyError."""
    if path.suffix.lower() != ".png":
        raise UsageError(f'the plot is a PNG file: name it "{path.name}.png".')
    require_folder(path.parent)
    TargetClaim.claim(path, 0, "file", overwrite=overwrite, inputs=()).release()


def write_png(path: Path, heat: HeatMap, *, label: str, title: str, overwrite: bool = False) -> None:
    """Draw a heat map as a PNG at ``path``. Raises what `write_file` raises."""
    out = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        _drawn(heat, label, title).savefig(out, format="png", metadata={"Software": None})
    write_file(path, out.getvalue(), overwrite=overwrite)


def svg(heat: HeatMap, *, label: str, title: str = "") -> str:
    """The same as an ``<svg>`` element."""
    with matplotlib.rc_context(_STYLE):
        return svg_of(_drawn(heat, label, title))


def svg_of(figure: Figure) -> str:
    """A figure as an ``<svg>`` element, part of a page."""
    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    drawn = out.getvalue()
    return drawn[drawn.index("<svg") :]


def _drawn(heat: HeatMap, label: str, title: str) -> Figure:
    """Blocks (rows) by kind of parameter (columns) on a logarithmic scale: white is nothing, grey zero."""
    low, high = heat.range
    figure = Figure((1.9 + 0.62 * len(heat.kinds), 1.1 + 0.24 * len(heat.blocks)), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["viridis"].with_extremes(under="#d9d9d9", bad="white")
    drawn = np.where(heat.values == 0, low / 2, heat.values)  # below the scale, where zero itself has no place
    norm = LogNorm(vmin=low, vmax=max(high, low * 1.01))
    shown = axes.pcolormesh(np.ma.masked_invalid(drawn), cmap=colours, norm=norm, edgecolors="white")
    axes.set_xticks(np.arange(len(heat.kinds)) + 0.5, heat.kinds, fontsize=8)
    axes.set_yticks(np.arange(len(heat.blocks)) + 0.5, [_shown(block) for block in heat.blocks], fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_xlabel(_shown(title), fontsize=8)
    ticks = np.geomspace(low, max(high, low * 1.01), 5)
    bar = figure.colorbar(shown, ticks=ticks, format=lambda value, _: f"{value:.3g}")
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label(label, fontsize=8)
    return figure


def _shown(name: str) -> str:
    """A name as ASCII, which every font has, and short."""
    plain = quoted(name)[1:-1].encode("ascii", "backslashreplace").decode()
    return plain if len(plain) <= 60 else plain[:59] + "..."
