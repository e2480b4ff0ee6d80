"""The table of ranks of ``mergetool diff``, with capped, missed and empty matrices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.cli import console

if TYPE_CHECKING:
    from mergetool.difference.extract import Extraction
    from mergetool.difference.layer import ExtractedLayer
    from mergetool.options.differences import DiffOptions

# The first of these that a matrix is in is its row of the table.
GROUPS = ("attention", "ffn", "adaln", "embedder", "final")


def in_group(groups: frozenset[str]) -> str:
    """The row of the tables that a module is in: the first of `GROUPS`, or other."""
    return next((group for group in GROUPS if group in groups), "other")


def print_ranks(extraction: Extraction, options: DiffOptions, target: Path, *, verbose: bool) -> None:
    """Print a row for each group, and the matrices that miss the request."""
    rows = [_row(name, layers, options) for name, layers in _by_group(extraction.layers).items()]
    if options.budget:
        console.heading("budget", _budget_line(extraction, options, target))
    console.heading("ranks", "")
    console.table(["group", "matrices", "rank min/med/max", "energy", "residual", "capped"], rows)
    _print_capped(extraction.layers, options)
    _print_unmet(extraction.layers, options, verbose=verbose)


def _print_capped(layers: Sequence[ExtractedLayer], options: DiffOptions) -> None:
    capped = [layer for layer in layers if layer.capped]
    if not capped:
        return
    wanted = [layer.wanted for layer in capped if layer.wanted is not None]
    worst = min(capped, key=lambda layer: layer.energy)
    if options.budget:
        console.heading("", f"{len(capped)} capped at {options.cap}: --rank-max 0 leaves it to the budget")
        return
    advice = (
        f"--rank-max {max(wanted)} would reach {options.threshold:g}"
        if len(wanted) == len(capped)
        else f"--rank-max 0 would reach {options.threshold:g}"
    )
    if options.share is None:
        advice = f"--rank-max 0 keeps all that --rule {options.rule} does"
    console.heading("", f"{len(capped)} capped at {options.cap}, down to {worst.energy:.4f} ({worst.name}): {advice}")


def _budget_line(extraction: Extraction, options: DiffOptions, target: Path) -> str:
    size = target.stat().st_size
    residual = (
        sum(layer.residual**2 * layer.total for layer in extraction.layers)
        / sum(layer.total for layer in extraction.layers)
    ) ** 0.5
    return f"{size:,} of {options.budget_bytes:,} bytes · residual {100 * residual:.1f} % of all matrices together, the least at that size"


def _print_unmet(layers: Sequence[ExtractedLayer], options: DiffOptions, *, verbose: bool) -> None:
    """Print matrices without any direction, and those whose dtype keeps them from the threshold."""
    nothing = [layer.name for layer in layers if layer.rank == 0]
    if nothing:
        total = sum(layer.total for layer in layers)
        share = 100 * sum(layer.total for layer in layers if layer.rank == 0) / total
        shown = console.listed(nothing, most=len(nothing) if verbose else 2)
        console.heading("", f"{len(nothing)} got rank 0, {share:.2g} % of the matrices' difference: {shown}")
    missed = [layer for layer in layers if layer.missed]
    if missed:
        worst = min(missed, key=lambda layer: 1 - layer.residual**2)
        console.heading(
            "",
            f"{len(missed)} below the threshold as stored, down to {1 - worst.residual**2:.7f} ({worst.name}): "
            f"{options.dtype} rounds away more than it leaves; --dtype fp32 would reach it",
        )


def print_spectra(extraction: Extraction, options: DiffOptions) -> None:
    """The side file, and how much of it was known already."""
    if options.spectra is None:
        return
    spectra, known = Path(options.spectra), len(extraction.layers) - len(extraction.searched)
    searched = f"{console.plural(len(extraction.searched), 'matrix')} searched and added"
    console.heading("spectra", f"{spectra}  {console.size(spectra.stat().st_size)}  {known} known · {searched}")


def _by_group(layers: Sequence[ExtractedLayer]) -> dict[str, list[ExtractedLayer]]:
    rows: dict[str, list[ExtractedLayer]] = {}
    for group in (*GROUPS, "other"):
        chosen = [layer for layer in layers if group == next((g for g in GROUPS if g in layer.groups), "other")]
        if chosen:
            rows[group] = chosen
    return rows


def _row(name: str, layers: Sequence[ExtractedLayer], options: DiffOptions) -> list[str]:
    ranks = sorted(layer.rank for layer in layers)
    total = sum(layer.total for layer in layers)
    energy = sum(layer.energy * layer.total for layer in layers) / total
    residual = (sum(layer.residual**2 * layer.total for layer in layers) / total) ** 0.5
    capped = sum(layer.capped for layer in layers)
    return [
        name,
        str(len(layers)),
        f"{ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}",
        f"{energy:.4f}",
        f"{100 * residual:.1f} %",
        f"{capped} at {options.cap}" if capped else "",
    ]
