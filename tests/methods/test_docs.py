"""docs/reference/methods.md says which comparisons with peers there are."""

from __future__ import annotations

import re

from benchmarks.peers_parity import PAGE, absent_lines, parity_lines
from tests.methods.parity.cases import CASES


def between(name: str) -> list[str]:
    found = re.search(rf"<!-- table: {name} -->\n(.*?)\n?<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found, f"{PAGE} has no place for {name}"
    return found[1].splitlines()


def test_the_comparisons_are_current() -> None:
    def names(lines: list[str]) -> list[str]:
        return [re.sub(r"\| [^|]+ (?=\| [^|]*\|$)", "", line) for line in lines if line.startswith("| ")]

    assert names(between("parity")) == names(parity_lines([0.0] * len(CASES))), "run: python -m benchmarks.peers_parity"


def test_what_is_not_compared_is_current() -> None:
    assert between("absent") == absent_lines(), "run: python -m benchmarks.peers_parity"


def test_differences_in_the_table_are_those_that_tests_allow() -> None:
    rows = between("parity")[2 : 2 + len(CASES)]
    for case, row in zip(CASES, rows, strict=True):
        shown = float(row.split("|")[4])
        assert (shown > case.rounding) == bool(case.why), row
