"""Plots of a report, as SVG that is part of the page. Same numbers, same bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from mergetool.comparison.plots import svg_of
from mergetool.verification import images
from mergetool.verification.pictures import Column


def measures(columns: Sequence[Column]) -> str:
    """Draw every picture's structure, contrast and clipped share, with the limits.

    A column is a row of points.
    """
    figure = Figure((7.2, 0.9 + 0.3 * len(columns)), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    shown = (
        ("structure", images.LEAST_STRUCTURE, (0.0, 1.0)),
        ("contrast", images.LEAST_CONTRAST, None),
        ("clipped", images.MOST_CLIPPED, (0.0, 1.0)),
    )
    for axes, (name, limit, bounds) in zip(panels, shown, strict=True):
        for row, column in enumerate(columns):
            values = [getattr(picture, name) for picture in column.measures]
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
    return svg_of(figure)
