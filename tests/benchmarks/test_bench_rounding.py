"""The benchmark of rounding: its cases are what they say, and the summaries are the oracle's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench_rounding
from benchmarks.bench_rounding import Case, cases, disagreement, table, write_page
from mergetool.checkpoint import dtypes


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("cases")
    return list(cases(folder, shape=(64, 512), outputs=(dtypes.BF16, dtypes.F8_E4M3)))


def test_the_summaries_are_the_oracles(found: list[Case]) -> None:
    assert disagreement(found) < 1e-6


def test_the_summary_is_of_more_than_a_sample(tmp_path: Path) -> None:
    """Of a weight of two chunks a merge looks at the first by itself."""
    one = next(iter(cases(tmp_path, shape=(2, 1 << 19), outputs=(dtypes.BF16,))))
    assert disagreement([one]) < 1e-6


def test_a_summary_that_counts_wrongly_is_not_accepted(found: list[Case]) -> None:
    wrong = replace(found[0], summary=replace(found[0].summary, eaten=found[0].summary.eaten + 1))
    with pytest.raises(ValueError, match="the oracle"):
        disagreement([wrong, *found[1:]])


def test_nearest_loses_a_tenth_of_half_a_unit_and_stochastic_rounding_keeps_it(found: list[Case]) -> None:
    """One element in 25 moves by a unit: a share of 32768 has a standard deviation of 2.2 %."""
    small = {case.mode: case.truth.projection for case in found if (case.size, case.spread) == (0.1, "each")}
    assert small["nearest"] == pytest.approx(0, abs=1e-9)
    assert small["stochastic"] == pytest.approx(1, abs=0.09)


def test_ten_half_units_come_through_every_rounding(found: list[Case]) -> None:
    assert all(abs(case.truth.projection - 1) < 0.01 for case in found if case.size == 10)


def test_the_table_has_a_row_for_every_delta(found: list[Case]) -> None:
    lines = table(found)
    assert len(lines) == 2 + 2 * 2 * 3
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_has_a_place_for_every_table(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(bench_rounding.PAGE.read_text())
    for name in ("deltas", "cost"):
        write_page(name, ["| it is here |"], page)
    assert page.read_text().count("| it is here |\n<!-- end -->") == 2
    with pytest.raises(ValueError, match="no place"):
        write_page("nothing", [], page)
