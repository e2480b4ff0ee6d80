from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from benchmarks import provenance
from benchmarks.provenance import COLUMNS, Result, append, median_ratio, percentile


def result(**changes: object) -> Result:
    fields: dict[str, object] = {
        "benchmark": "merge",
        "case": "small",
        "provider": "mergetool",
        "metric": "seconds",
        "values": [3.0, 1.0, 2.0],
        "unit": "s",
    }
    return Result(**(fields | changes))  # type: ignore[arg-type]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as table:
        return list(csv.DictReader(table))


@pytest.mark.parametrize(
    ("values", "share", "wanted"),
    [
        ([5.0], 0.2, 5.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([1.0, 2.0], 0.5, 1.5),
        ([0.0, 10.0], 0.8, 8.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_percentiles_interpolate_between_neighbours(values: list[float], share: float, wanted: float) -> None:
    assert percentile(values, share) == pytest.approx(wanted)


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


def test_ratios_are_taken_run_by_run_so_that_drift_cancels() -> None:
    assert median_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0


def test_the_first_row_makes_the_table_and_later_ones_are_appended(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    append([result()], folder=tmp_path, path=table)
    append([result(provider="byte copy"), result(provider="peer")], folder=tmp_path, path=table)
    assert table.read_text().splitlines()[0] == ",".join(COLUMNS)
    assert [row["provider"] for row in rows(table)] == ["mergetool", "byte copy", "peer"]


def test_a_row_holds_median_percentiles_and_provenance(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    append(
        [result(ratio_to="byte copy", ratio=1.25, bytes_read=7, config={"b": 1, "a": 2})], folder=tmp_path, path=table
    )
    (row,) = rows(table)
    assert (row["value"], row["p20"], row["p50"], row["p80"], row["n"]) == ("2.0", "1.4", "2.0", "2.6", "3")
    assert (row["ratio_to"], row["ratio"], row["bytes_read"], row["peak_anon_mb"]) == ("byte copy", "1.25", "7", "")
    assert json.loads(row["config"]) == {"a": 2, "b": 1}
    assert re.fullmatch(r"unknown|[0-9a-f]{10}(\+changes)?", row["commit"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["date"])
    assert "cores" in row["machine"]
    assert "RAM" in row["machine"]


def test_a_table_with_other_columns_is_left_alone(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    table.write_text("benchmark,seconds\nold,1\n")
    with pytest.raises(ValueError, match="columns"):
        append([result()], folder=tmp_path, path=table)
    assert table.read_text() == "benchmark,seconds\nold,1\n"


def test_the_kept_table_has_the_columns_the_code_writes() -> None:
    if provenance.RESULTS.exists():
        assert provenance.RESULTS.read_text().partition("\n")[0] == ",".join(COLUMNS)
