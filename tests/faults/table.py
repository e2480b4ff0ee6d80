"""The counts of fault runs, read from the file that harnesses append to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.faults.rows import Row
from tests.faults.tally import ROOT

PAGE = ROOT / "docs" / "explanation" / "faults.md"
BEGIN, END = "<!-- counts -->", "<!-- end of counts -->"


def lines(results: Path) -> list[dict[str, Any]]:
    """Every part that was saved."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def parts(results: Path, row: Row, commit: str) -> list[dict[str, Any]]:
    """The parts of a row that were done at a commit."""
    return [one for one in lines(results) if one["row"] == row.number and one["commit"] == commit]


def rows(results: Path) -> list[dict[str, Any]]:
    """One object a row, commit and tier, its parts added up, in the order of the rows."""
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for one in lines(results):
        key = one["row"], one["commit"], one["tier"]
        if key not in found:
            found[key] = {**one, "kinds": Counter(one["kinds"])}
            continue
        for name in ("injected", "fired", "violations", "seconds"):
            found[key][name] += one[name]
        found[key]["kinds"].update(one["kinds"])
    return sorted(found.values(), key=lambda one: (_number(one["row"]), one["row"]))


def _number(row: str) -> int:
    return int("".join(c for c in row if c.isdigit()) or 0)


def summary(results: Path) -> str:
    """For a terminal: injected, fired and violations side by side."""
    found = rows(results)
    body = [
        f"{one['row']:>4}  {one['what']:<48} {one['injected']:>10,} {one['fired']:>10,} {one['violations']:>10,}  {one['commit']}"
        for one in found
    ]
    return "\n".join([f"{'row':>4}  {'promise':<48} {'injected':>10} {'fired':>10} {'violations':>10}  commit", *body])


def markdown(found: Iterable[dict[str, Any]]) -> str:
    """The table of docs/explanation/faults.md."""
    head = "| row | what fails | injected | fired | violations | commit | machine |\n|---|---|---:|---:|---:|---|---|"
    body = [
        f"| {one['row']} | {one['what']} | {one['injected']:,} | {one['fired']:,} | {one['violations']:,} | {one['commit']} | {one['machine']} |"
        for one in found
    ]
    return "\n".join([head, *body])


def write(results: Path, page: Path = PAGE) -> None:
    """Put the counts between the markers of the page."""
    text = page.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(f"{text[:begin]}\n{markdown(rows(results))}\n{text[end:]}")
