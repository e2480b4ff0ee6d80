"""The page of a verification: verdicts, contact sheets, heat map, numbers and the recipe.

It is one self-contained HTML file, for a phone or a printer.
"""

from __future__ import annotations

import base64
import functools
import io
import json
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mergetool import __version__
from mergetool.comparison import heatmap, page
from mergetool.comparison.energies import Distance, relative
from mergetool.comparison.page import PageTable
from mergetool.sampler.request import Pictures
from mergetool.verification import pictures
from mergetool.verification.pictures import Column, PicturesReport
from mergetool.verification.weights import WeightsReport

JPEG_FROM = 256
"""Pictures with a longer side than this go into the page as JPEG."""

SHOTS_SHOWN = 12
"""Shots that the page shows; all are measured."""


@dataclass(frozen=True, slots=True)
class ShownPicture:
    """One picture of the page: its data URI, its caption, and whether it shows its prompt.

    The caption is its model and stage; the verdict is None where it was not judged.
    """

    source: str
    label: str
    shows_prompt: bool | None
    own: bool


def render(name: str, weights: WeightsReport, looked: PicturesReport | None, *, left_out: str = "") -> str:
    """The page of one verification. ``left_out`` says why there are no pictures."""
    from mergetool.comparison.plots import svg  # matplotlib takes half a second, which only a page is worth
    from mergetool.verification import plots

    first = weights.distances.get(weights.anchor, [])
    return page.template("mergetool.verification", "report.html.j2").render(
        name=name,
        version=__version__,
        badge=badge(weights, looked),
        weights=weights,
        damage=weights.damage(),
        verdicts=() if looked is None else looked.verdicts,
        left_out=left_out,
        distances=_distances(weights),
        heat_map=svg(heatmap.of_distances(first), label="relative change") if first else "",
        columns=None if looked is None else _columns(looked),
        measures="" if looked is None else plots.measures(looked.merge_first),
        rows=[] if looked is None else _rows(looked),
        look=None if looked is None else looked.look,
        shown=SHOTS_SHOWN,
        record=json.dumps(_record(weights, looked), indent=1),
    )


def badge(weights: WeightsReport, looked: PicturesReport | None) -> str:
    """The word for all of it: failed where one check says no, not judged where none was made."""
    if weights.damage() or (looked is not None and not looked.passed):
        return "failed"
    return "passed" if weights.derived or looked is not None else "not judged"


def _distances(weights: WeightsReport) -> PageTable:
    """The relative distance from each parent, by group."""
    every = [distance for distances in weights.distances.values() for distance in distances]
    groups = [g for g in ("refiner", "layers", "embedder", "final") if any(g in d.groups for d in every)]
    rows = [
        [
            parent,
            _percent(relative(distances)),
            *(_percent(relative(distances, functools.partial(_in_group, group))) for group in groups),
        ]
        for parent, distances in weights.distances.items()
    ]
    return PageTable(["distance from", "all", *groups], rows)


def _in_group(group: str, distance: Distance) -> bool:
    return group in distance.groups


def _percent(value: float) -> str:
    return "0" if value == 0 else f"{100 * value:.3g} %"


def _columns(looked: PicturesReport) -> PageTable:
    rows = []
    for column in looked.merge_first:
        count = len(column.measures)
        rows.append(
            [
                column.label,
                "–" if column.adherence is None else f"{100 * column.adherence:.0f} %",
                *([] if column.scores is None else [f"{sum(column.scores) / count:.3f}"]),
                f"{sum(m.structure for m in column.measures) / count:.2f}",
                f"{sum(m.contrast for m in column.measures) / count:.0f}",
                f"{sum(m.noise for m in column.measures)}",
                f"{sum(m.collapsed for m in column.measures)}",
            ]
        )
    scored = ["score"] if any(column.scores is not None for column in looked.columns) else []
    return PageTable(["pictures of", "adherence", *scored, "structure", "contrast", "noise", "collapsed"], rows)


def _rows(looked: PicturesReport) -> list[tuple[str, int, list[ShownPicture]]]:
    """Prompt, seed and pictures of each shot that the page shows, the merge's own pictures first."""
    shots = looked.look.shots[:SHOTS_SHOWN]
    return [
        (shot.prompt, shot.seed, [_shown(column, index, looked.own(column)) for column in looked.merge_first])
        for index, shot in enumerate(shots)
    ]


def _shown(column: Column, index: int, own: bool) -> ShownPicture:
    shows = None if column.adherent is None else column.adherent[index]
    return ShownPicture(_data_uri(column.pictures[index]), column.label, shows, own)


def _data_uri(picture: Pictures) -> str:
    out = io.BytesIO()
    kind = "JPEG" if max(picture.shape[:2]) > JPEG_FROM else "PNG"
    Image.fromarray(picture).save(out, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def _record(weights: WeightsReport, looked: PicturesReport | None) -> dict[str, Any]:
    return {
        "expression": weights.expression,
        "parents": list(weights.parents),
        "derived": weights.derived,
        "sound": weights.sound,
        "bytes_compared": weights.bytes_compared,
        "pictures": None if looked is None else pictures.summary(looked),
    }
