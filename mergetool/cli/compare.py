"""``mergetool compare``: how far apart two models are, and by which multiplier to add their difference."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption
from mergetool.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from mergetool.comparison.comparison import Report
    from mergetool.comparison.energies import Energies
    from mergetool.ops.movement import Movement

EXAMPLES = """\b
Examples:
  mergetool compare lab.base lab.striped
  mergetool compare z-image artshoot
  mergetool compare deturbo artshoot --reference beret --onto alkahest
  mergetool compare deturbo artshoot --reference tuned --reference-base z-image --multiplier recommended
  mergetool compare z-image artshoot --target 0.5% --report artshoot.html --plot artshoot.png
  mergetool compare lab.base lab.striped --fail-on "distance>10%" --fail-on "refiner:distance>0"

The delta is B - A; --reference C is a fine-tune of A whose size is known to be right. Two multipliers are advised: the one that gives the
delta the size of C - A, and the one that makes it --target of the norm of what it is added to. Rounding is that of `mergetool merge "X + m*(B
- A)"`, with the multiplier m that --multiplier names, and the figure is the one that merge reports. Refiners are measured but left out of
totals, since merges keep them: --include "*" counts them.

--fail-on METRIC>NUMBER or GROUP:METRIC>NUMBER, also with <; METRIC is distance, cosine, reference (the multiplier by --reference), target (the one by
--target), untraced (elements that left no trace) or lost (share of the delta that rounding lost).
"""

_CONDITION = re.compile(
    r"(?:(?P<group>[^:<>]+):)?(?P<metric>[a-z]+)(?P<sign>[<>])(?P<number>[-+.0-9eE]+)(?P<percent>%?)"
)
METRICS = ("distance", "cosine", "reference", "target", "untraced", "lost")


@console.command
def compare(
    base: Annotated[str, typer.Argument(help="The model that is subtracted", metavar="A")],
    variant: Annotated[str, typer.Argument(help="The model it is subtracted from", metavar="B")],
    reference: Annotated[
        str | None, typer.Option(help="A fine-tune whose difference has the right size.", metavar="MODEL")
    ] = None,
    reference_base: Annotated[
        str | None, typer.Option(help="What to subtract from the reference [default: A]", metavar="MODEL")
    ] = None,
    onto: Annotated[
        str | None, typer.Option(help="The model that the difference will be added to [default: A]", metavar="MODEL")
    ] = None,
    multiplier: Annotated[
        str, typer.Option("--multiplier", "-m", help="A number, or recommended: what rounding is looked at with.")
    ] = "1",
    target: Annotated[str, typer.Option(help="Wanted change, as a share of the norm of what is changed.")] = "1%",
    include: Annotated[
        list[str] | None, typer.Option(help="Compare only these. Repeatable.", metavar="PATTERN")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Do not compare these [default: refiners count in no total]. Repeatable.", metavar="PATTERN"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Dtype of the merge whose rounding is looked at [default: that of X]")
    ] = None,
    fail_on: Annotated[
        list[str] | None, typer.Option(help="Exit with 1 where this holds. Repeatable.", metavar="CONDITION")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the heat map.", metavar="FILE.png")] = None,
    report: Annotated[Path | None, typer.Option(help="Write all of it as one HTML page.", metavar="FILE.html")] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: one a core]", min=1, max=256)] = None,
    reader: Annotated[str, typer.Option(help="auto, mmap or pread: how files are read; same figures.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing plot or report.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure how far B lies from A, block by block, in one pass; and advise a multiplier for B - A."""
    started = time.monotonic()
    conditions = [_condition(text) for text in fail_on or ()]
    share = _share("--target", target)
    method = console.choice("--reader", reader, ("auto", "mmap", "pread"))
    names = [onto or base, variant, base, *(name for name in (reference, reference_base) if name is not None)]
    with _reading_ahead([] if include or exclude else names) as used:
        from mergetool.comparison import comparison as comparing
        from mergetool.options.merging import MergeOptions

        size = comparing.multiplier_of(multiplier)
        options = MergeOptions(include=tuple(include or ()), exclude=tuple(exclude or ()), dtype=dtype)
        _require_targets(plot, report, overwrite=overwrite)
        with comparing.open_comparison(
            base, variant, reference=reference, reference_base=reference_base, onto=onto, options=options
        ) as opened:
            read = opened.bytes_read
            with console.progress("compare", read, shown=not (no_progress or as_json)) as advance:

                def moved(count: int) -> None:
                    used(count)
                    advance(count)

                found = comparing.compare(
                    opened, multiplier=size, target=share, threads=threads, method=method, progress=moved
                )
    failed = [said for condition in conditions if (said := _failure(found, condition))]
    if plot is not None or report is not None:
        _draw(found, plot, report, overwrite=overwrite)
    if as_json:
        console.print_json(_json(found) | {"failed": failed})
    else:
        _print(found, verbose=verbose)
        for kind, path in (("plot", plot), ("report", report)):
            if path is not None:
                console.heading(kind, str(path))
        console.heading("done", f"{console.size(read)} read  {time.monotonic() - started:.1f} s")
        _print_next(found)
    if failed:
        raise CheckFailed(f"{base} and {variant}: {'; '.join(failed)}.")


@contextmanager
def _reading_ahead(names: Sequence[str]) -> Iterator[Callable[[int], None]]:
    """Within the block the models' files are read into memory; gives the function to tell of bytes used."""
    from mergetool import models
    from mergetool.checkpoint.read_ahead import ReadAhead
    from mergetool.checkpoint.reader import Checkpoint

    with ExitStack() as stack:
        found = [stack.enter_context(Checkpoint.open(models.resolve(name).path)) for name in dict.fromkeys(names)]
        yield stack.enter_context(ReadAhead([file for each in found for file in each.files])).used


# --- what is asked -------------------------------------------------------------------------------------------


def _share(option: str, text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise UsageError(f'{option} is a share such as 0.8% or 0.008, not "{text}".')
    return value


def _condition(text: str) -> re.Match[str]:
    match = _CONDITION.fullmatch(text.replace(" ", ""))
    if match is None or match["metric"] not in METRICS:
        raise UsageError(
            f'--fail-on "{text}" is not METRIC>NUMBER or GROUP:METRIC>NUMBER with one of {", ".join(METRICS)}, as in "distance>10%".'
        )
    try:
        float(match["number"])
    except ValueError:
        raise UsageError(f'--fail-on "{text}": "{match["number"]}" is not a number.') from None
    return match


def _require_targets(plot: Path | None, report: Path | None, *, overwrite: bool) -> None:
    if plot is not None:
        from mergetool.comparison import plots

        plots.require_target(plot, overwrite=overwrite)
    if report is not None:
        from mergetool.comparison import page

        page.require_target(report, overwrite=overwrite)


# --- what is said --------------------------------------------------------------------------------------------


def _failure(report: Report, condition: re.Match[str]) -> str:
    """What holds that should not, or nothing; raises UsageError for a group that is not there."""
    group, metric = condition["group"], condition["metric"]
    groups = report.groups()
    if group is not None and group not in groups:
        raise UsageError(f'--fail-on: there is no group "{group}" here; choose one of {", ".join(groups)}.')
    energies = report.total if group is None else groups[group]
    movement = report.lost if group is None else report.rounding.get(group)
    value = {
        "distance": energies.distance,
        "cosine": energies.cosine,
        "reference": energies.to_reference,
        "target": energies.to_change(report.target),
        "untraced": movement.eaten / movement.moved if movement and movement.moved else None,
        "lost": 1 - movement.projection if movement and movement.moved else None,
    }[metric]
    limit = float(condition["number"]) / (100 if condition["percent"] else 1)
    if value is None or not (value > limit if condition["sign"] == ">" else value < limit):
        return ""
    return f"{metric} of {group or 'all'} is {value:.4g}, {condition['sign']} {limit:g}"


def _print(report: Report, *, verbose: bool) -> None:
    against = "" if report.reference is None else f" · reference {report.reference[0]} - {report.reference[1]}"
    console.heading("delta", f"{report.variant} - {report.base}{against} · to be added to {report.onto}")
    for finding in report.lineage:
        console.heading(finding.level, finding.text)
    console.table(_heads(report), [_row(name, energies, report) for name, energies in _rows(report).items()])
    if report.excluded:
        console.heading("", f"* not in the totals, since merges keep them; {len(report.excluded)} parts")
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
    rows = {f"{name}*" if report.is_excluded(name) else name: found for name, found in report.groups().items()}
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
    found = report.recommended
    if found is None:
        return
    why = (
        f"the size of {report.reference[0]} - {report.reference[1]}"
        if report.reference
        else f"{_percent(report.target)} of {report.onto}"
    )
    console.heading("advice", f"multiplier {float(found):g} gives the delta {why}")
    if found != report.multiplier:
        console.heading("", "--multiplier recommended looks at what rounding does to that")
    protect = " --protect refiner" if report.excluded else ""
    console.heading("next", f'mergetool merge "{report.merge_with(found)}"{protect} -o OUT.safetensors')


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


def _draw(found: Report, plot: Path | None, report: Path | None, *, overwrite: bool) -> None:
    from mergetool.comparison import heatmap, page, plots
    from mergetool.comparison.report import render

    if plot is not None:
        title = f"{found.variant} - {found.base}"
        heat = heatmap.of_distances(found.distances)
        plots.write_png(plot, heat, label="relative distance", title=title, overwrite=overwrite)
    if report is not None:
        page.write(report, render(found))


def _json(report: Report) -> dict[str, Any]:
    from mergetool.comparison.report import record

    return record(report)
