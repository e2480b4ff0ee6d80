"""Counts are added up by row, tier and commit, and stand side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import table
from tests.faults.tally import Tally


def saved(results: Path, row: str, fired: int, violations: int = 0) -> None:
    tally = Tally(row, f"promise {row}")
    for number in range(fired):
        tally.note("EIO", True, ["broken"] if number < violations else [])
    tally.save("long", results)


def test_parts_are_added_up(tmp_path: Path) -> None:
    results = tmp_path / "faults.json"
    saved(results, "10", 4)
    saved(results, "2", 3, violations=1)
    saved(results, "2", 5)
    one, other = table.rows(results)
    assert (one["row"], one["injected"], one["fired"], one["violations"]) == ("2", 8, 8, 1)
    assert (other["row"], other["fired"], other["kinds"]) == ("10", 4, {"EIO": 4})


def test_the_page_gets_its_table_between_the_markers(tmp_path: Path) -> None:
    results, page = tmp_path / "faults.json", tmp_path / "faults.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    saved(results, "3", 2)
    table.write(results, page)
    text = page.read_text()
    assert "| 3 | promise 3 | 2 | 2 | 0 |" in text
    assert "old" not in text
    assert text.startswith(f"before\n{table.BEGIN}\n|")
    assert text.endswith(f"|\n{table.END}\nafter\n")


def test_fault_that_does_not_fire_fails_the_row() -> None:
    tally = Tally("1", "calls")
    tally.note("EIO", True, [])
    tally.require(1)
    tally.note("EIO", False, [])
    with pytest.raises(AssertionError):
        tally.require(1)
