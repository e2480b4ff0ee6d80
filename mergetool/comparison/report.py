"""One self-contained HTML page of a comparison, and the same as a record for programs."""

from __future__ import annotations

import json
import math
from typing import Any

from mergetool import __version__
from mergetool.comparison import heatmap, page
from mergetool.comparison.comparison import Report
from mergetool.comparison.energies import Energies, percent
from mergetool.comparison.page import PageTable


def render(report: Report) -> str:
    """The page."""
    from mergetool.comparison import plots  # matplotlib takes half a second, which only a page is worth

    groups = report.groups()
    return page.template("mergetool.comparison", "compare.html.j2").render(
        report=report,
        version=__version__,
        recommended=None if report.recommended is None else f"{float(report.recommended):g}",
        target=percent(report.target),
        distance=percent(report.total.distance),
        lost=percent(1 - report.lost.projection),
        untraced=percent(report.lost.eaten / report.lost.moved if report.lost.moved else 0),
        groups=_table(
            "group", {f"{name}*" if report.is_excluded(name) else name: groups[name] for name in groups}, report
        ),
        blocks=_table("block", report.blocks(), report),
        rounding=_rounding(report),
        heat_map=plots.svg(heatmap.of_distances(report.distances), label="relative distance"),
        record=json.dumps(record(report), indent=1),
    )


def record(report: Report) -> dict[str, Any]:
    """The whole report for JSON, with None for values that are not finite."""
    return {
        "base": report.base,
        "variant": report.variant,
        "onto": report.onto,
        "reference": None if report.reference is None else list(report.reference),
        "target": report.target,
        "recommended": None if report.recommended is None else float(report.recommended),
        "total": _energies(report.total, report.target),
        "groups": {
            name: _energies(energies, report.target) | {"excluded": report.is_excluded(name)}
            for name, energies in report.groups().items()
        },
        "blocks": {name: _energies(energies, report.target) for name, energies in report.blocks().items()},
        "parts": {
            distance.name: _energies(distance.energies, report.target) | {"excluded": distance.name in report.excluded}
            for distance in report.distances
        },
        "lineage": [{"level": finding.level, "text": finding.text} for finding in report.lineage],
        "left_out": [{"name": name, "reason": reason} for name, reason in report.left_out],
        "rounding": {
            "expression": report.expression,
            "multiplier": float(report.multiplier),
            "dtype": report.dtype,
            "sampled": report.sampled,
            "total": report.lost.record(),
            "groups": {name: movement.record() for name, movement in report.rounding.items()},
        },
    }


def _table(first: str, rows: dict[str, Energies], report: Report) -> PageTable:
    referenced = report.reference is not None
    heads = ["cosine", "m by reference"] if referenced else []
    return PageTable(
        [first, "distance", *heads, f"m for {percent(report.target)}"],
        [
            [
                name,
                percent(energies.distance),
                *([_text(energies.cosine, ".3f"), _text(energies.to_reference)] if referenced else []),
                _text(energies.to_change(report.target)),
            ]
            for name, energies in [*rows.items(), *([("all", report.total)] if first == "group" else [])]
        ],
    )


def _rounding(report: Report) -> PageTable:
    rows = [(name, each) for name, each in (*report.rounding.items(), ("all", report.lost)) if each.moved]
    return PageTable(
        ["group", "left no trace", "below half a unit", "kept"],
        [
            [
                name,
                percent(each.eaten / each.moved),
                percent(each.below_half_ulp / each.moved),
                percent(each.projection),
            ]
            for name, each in rows
        ],
    )


def _energies(energies: Energies, target: float) -> dict[str, Any]:
    return {
        "elements": energies.elements,
        "norm_base": math.sqrt(energies.base),
        "norm_variant": math.sqrt(energies.variant),
        "norm_delta": math.sqrt(energies.delta),
        "distance": energies.distance if math.isfinite(energies.distance) else None,
        "cosine": energies.cosine,
        "multiplier_by_reference": energies.to_reference,
        "multiplier_by_target": energies.to_change(target),
    }


def _text(value: float | None, form: str = ".4g") -> str:
    return "–" if value is None else format(value, form)
