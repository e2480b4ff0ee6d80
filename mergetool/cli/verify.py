"""``mergetool verify``: is a merge what its recipe says?"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console
from mergetool.cli.console import JsonOption, NoProgressOption
from mergetool.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from mergetool.verify.weights import WeightsReport

EXAMPLES = """\b
Examples:
  mergetool verify out.safetensors
  mergetool verify out.safetensors --input tuned=/models/tuned.safetensors --json

Inputs are looked for under the names that the recipe records, then beside OUT; --input says where else one is.
"""


@console.command
def verify(
    output: Annotated[str, typer.Argument(help="A merge that mergetool made.", metavar="OUT")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Where an input is now. Repeatable.", metavar="NAME=MODEL")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: all cores]", min=1, max=256)] = None,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
) -> None:
    """Derive every tensor of a merge again from its recorded recipe and inputs, and compare byte by byte.

    Nothing is written. Exit code 1 when anything is not what the recipe says.
    """
    from mergetool.verify.weights import check_weights

    started = time.monotonic()
    places = dict(_place(text) for text in inputs or ())
    with console.progress("verify", 100, shown=not (no_progress or as_json), unit="%") as bar:
        shown = 0

        def advance(done: int, total: int) -> None:
            nonlocal shown
            bar(100 * done // total - shown)
            shown = 100 * done // total

        report = check_weights(output, inputs=places, threads=threads, progress=advance)
    if as_json:
        console.print_json(_json(report))
    else:
        _print(report, time.monotonic() - started)
    if not report.sound:
        raise CheckFailed(f"{output} is not what its recipe says.")


def _place(text: str) -> tuple[str, str]:
    name, equals, place = text.partition("=")
    if not (name and equals and place):
        raise UsageError(f'--input "{text}" is not NAME=MODEL, as in --input tuned=/models/tuned.safetensors.')
    return name, place


def _print(report: WeightsReport, seconds: float) -> None:
    console.heading("recipe", report.expression)
    for what, names in (
        ("changed since they were merged", report.changed),
        ("missing, or of another shape or dtype", report.missing),
        ("not in the recipe", report.extra),
        ("not what the recipe says", [f"{name} (from byte {at})" for name, at in report.differing.items()]),
    ):
        if names:
            console.heading("", f"{len(names)} {what}: {console.listed(names)}")
    compared = (
        f"{report.merged} merged and {report.kept} kept tensors, {console.size(report.bytes_compared)} derived again"
    )
    console.heading("sound" if report.sound else "UNSOUND", f"{compared}  {seconds:.1f} s")


def _json(report: WeightsReport) -> dict[str, Any]:
    return {
        "sound": report.sound,
        "expression": report.expression,
        "merged": report.merged,
        "kept": report.kept,
        "bytes_compared": report.bytes_compared,
        "changed": report.changed,
        "missing": report.missing,
        "extra": report.extra,
        "differing": report.differing,
    }
