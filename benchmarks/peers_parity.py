"""Merge methods: the tables of docs/reference/methods.md, from the comparisons with mergekit and sd-mecha.

    python -m benchmarks.peers_parity

What is compared is in tests/methods/parity, where tests hold every line of the table.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.bench_rounding import write_page
from tests.methods.parity.absent import ABSENT
from tests.methods.parity.case import Case
from tests.methods.parity.cases import CASES

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "methods.md"


def parity_lines(differences: Sequence[float]) -> list[str]:
    """The table, with the largest difference of each of CASES."""
    lines = ["| method | against | on | largest difference | why |", "| --- | --- | --- | ---: | --- |"]
    return lines + [_row(case, found) for case, found in zip(CASES, differences, strict=True)]


def _row(case: Case, difference: float) -> str:
    ours = ", ".join(f"{name}={_shown(value)}" for name, value in case.parameters.items())
    size = "" if case.size == 1 else f", {case.size:g} x"
    shapes = ", ".join("x".join(map(str, shape)) for shape in case.shapes)
    where = f"{case.count} {case.kind}{size} of {shapes}"
    calls = f"`{case.method}({ours})` | {case.theirs.peer} `{case.theirs.text}`"
    return f"| {calls} | {where} | {difference:.0e} | {case.why or 'rounding'} |"


def absent_lines() -> list[str]:
    """What the peers have and is not in the table."""
    rows = [f"| {peer} | `{name}` | {why} |" for peer, names in ABSENT.items() for name, why in names.items()]
    return ["| peer | method | why |", "| --- | --- | --- |", *rows]


def _shown(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write both into the page."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args(arguments)  # fmt: skip
    write_page("absent", absent_lines(), PAGE)
    peers = " and ".join(f"{name} {version(name)}" for name in ("mergekit", "sd-mecha"))
    note = f"<sub>{peers} from PyPI. Written by `python -m benchmarks.peers_parity`.</sub>"
    write_page("parity", [*parity_lines([case.largest_difference() for case in CASES]), "", note], PAGE)


if __name__ == "__main__":
    main()
