"""``mergetool compare``: the distance of two models, and a multiplier for their difference."""

from __future__ import annotations

import math
import sys
import time
from typing import TYPE_CHECKING

from mergetool.api.comparisons import Compare, run_compare
from mergetool.cli import console
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.comparison.comparison import Comparison, Report
    from mergetool.comparison.energies import Energies
    from mergetool.ops.movement import Movement

EXAMPLES = """\b
Examples:
  mergetool compare lab.base lab.striped
  mergetool compare z-image artshoot
  mergetool compare alkahest "alkahest + 20*(artshoot - base)"
  mergetool compare base artshoot --reference beret --onto alkahest
  mergetool compare alkahest merged.safetensors --reference tuned --reference-base z-image --multiplier recommended
  mergetool compare z-image artshoot --target 0.5% --report artshoot.html --plot artshoot.png
  mergetool compare lab.base lab.striped --fail-on "distance>50%" --fail-on "refiner:distance>60%"

The difference is B - A. mergetool advises two multipliers for it: with --reference C, a fine-tune of A, the one that gives it the size of \
C - A; and the one that makes it --target of the norm of --onto. It measures rounding loss as `mergetool merge "ONTO + m*(B - A)"` would \
have it, with the m of --multiplier. Totals leave out the refiners, since merges keep them; --include "*" counts them too.

CONDITION is METRIC>NUMBER or GROUP:METRIC>NUMBER, or with <. METRIC is distance, cosine, reference (the multiplier by --reference), target \
(the one by --target), untraced (share of elements that rounding left unchanged) or lost (share of the difference that rounding lost).
"""


@command(Compare)
def compare(typed: Typed) -> None:
    """Measure how far one model is from another.

    The result has every group and block, and a multiplier for adding B - A to a model.
    """
    with _CompareReport.shown(typed) as report:
        result = run_compare(typed.request(Compare), report)
    result.require_passed()


class _CompareReport(CommandEvents):
    """The report of a comparison."""

    def __init__(self, typed: Typed) -> None:
        super().__init__(typed)
        self._started = time.monotonic()

    def done(self, plan: Comparison, result: Report) -> None:
        """Groups, blocks, rounding and the advice."""
        if not self.prints:
            from mergetool.comparison.report import record

            self.json |= record(result) | {"failed": list(result.failed)}
            return
        _print(result, verbose=self.typed.verbose)
        for kind in ("plot", "report"):
            if kind in self.typed.given:
                console.heading(kind, str(self.typed.given[kind]))
        seconds = time.monotonic() - self._started
        console.heading("done", f"{console.size(plan.bytes_read)} read  {seconds:.1f} s")
        _print_next(result)


def _print(report: Report, *, verbose: bool) -> None:
    against = "" if report.reference is None else f" · reference {report.reference[0]} - {report.reference[1]}"
    console.heading("delta", f"{report.variant} - {report.base}{against} · to be added to {report.onto}")
    for finding in report.lineage:
        console.heading(finding.level, finding.text)
    console.table(_heads(report), [_row(name, energies, report) for name, energies in _rows(report).items()])
    kept = len(report.kept)
    if kept:
        console.heading("", f"* not in the totals, since merges keep them; {kept} parts")
    if len(report.excluded) > kept:
        console.heading("", f"* of text encoders, which are in no total; {len(report.excluded) - kept} parts")
    if report.left_out:
        names = [f"{name} ({reason})" for name, reason in report.left_out]
        console.heading("left out", f"{len(names)}: {console.listed(names, most=1000 if verbose else 2)}")
    _print_rounding(report, verbose=verbose)
    _print_blocks(report)


def _heads(report: Report) -> list[str]:
    heads = ["group", "parameters", "|A|", "|B|", "|B - A|", "distance"]
    if report.reference is not None:
        heads += ["cosine", "m by reference"]
    return [*heads, f"m for {_percent(report.target)}"]


def _rows(report: Report) -> dict[str, Energies]:
    rows = {f"{name}*" if report.is_excluded(name) else name: energies for name, energies in report.groups().items()}
    return rows | {"all": report.total}


def _row(name: str, energies: Energies, report: Report) -> list[str]:
    norms = [f"{math.sqrt(value):.4g}" for value in (energies.base, energies.variant, energies.delta)]
    advice = [_number(energies.cosine, ".3f"), _number(energies.to_reference)] if report.reference else []
    return [
        name,
        console.parameters(energies.elements),
        *norms,
        _percent(energies.distance),
        *advice,
        _number(energies.to_change(report.target)),
    ]


def _print_rounding(report: Report, *, verbose: bool) -> None:
    lost = report.lost
    if not lost.moved:
        return
    console.heading(
        "round",
        f"{report.expression}, to {report.dtype}: {_percent(lost.eaten / lost.moved)} of {console.parameters(lost.moved)} elements left no trace, "
        f"rounding keeps {_percent(lost.projection)} of the change",
    )
    if verbose:
        rows = [(name, movement) for name, movement in report.rounding.items() if movement.moved]
        console.table(
            ["group", "moved", "left no trace", "below half a unit", "kept"],
            [_rounding_row(name, movement) for name, movement in rows],
        )


def _rounding_row(name: str, movement: Movement) -> list[str]:
    shares = (movement.eaten / movement.moved, movement.below_half_ulp / movement.moved, movement.projection)
    return [name, console.parameters(movement.moved), *map(_percent, shares)]


def _print_blocks(report: Report) -> None:
    from mergetool.comparison import heatmap

    heat = heatmap.of_distances(report.distances)
    palette = heatmap.SHADES if _can_print(heatmap.SHADES) else heatmap.PLAIN_SHADES
    referenced = report.reference is not None
    blocks = report.blocks()
    rows = []
    for name, shades in zip(heat.blocks, heat.shades(palette), strict=True):
        energies = blocks[name]
        advice = [_number(energies.cosine, ".3f"), _number(energies.to_reference)] if referenced else []
        cells = [shade * 3 for shade in shades]
        rows.append([name, *cells, _percent(energies.distance), *advice, _number(energies.to_change(report.target))])
    heads = ["cosine", "m by reference"] if referenced else []
    console.table(
        ["block", *(kind[:5] for kind in heat.kinds), "distance", *heads, f"m for {_percent(report.target)}"],
        rows,
        left=1 + len(heat.kinds),
    )
    steps = [f"{shade * 3} from {_percent(value)}" for shade, value in heat.steps(palette)]
    console.heading("", f"distance: {'  '.join(steps)}, at most {_percent(heat.range[1])}")


def _print_next(report: Report) -> None:
    multiplier = report.recommended
    if multiplier is None:
        return
    why = (
        f"the size of {report.reference[0]} - {report.reference[1]}"
        if report.reference
        else f"{_percent(report.target)} of {report.onto}"
    )
    console.heading("advice", f"multiplier {float(multiplier):g} gives the delta {why}")
    if multiplier != report.multiplier:
        console.heading("", "--multiplier recommended measures its rounding loss")
    protect = " --protect refiner" if report.kept else ""
    console.heading("next", f'mergetool merge "{report.merge_with(multiplier)}"{protect} -o OUT.safetensors')


def _can_print(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None else format(value, form)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
