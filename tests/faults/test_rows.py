"""CI's share of every promise: so many faults, all of them fired, nothing violated.

``python -m tests.faults --long`` does the same with the counts of a release.
"""

from __future__ import annotations

import pytest

from tests.faults.rows import ROWS, Bench, Row

pytestmark = pytest.mark.loaded


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_promise(bench: Bench, row: Row) -> None:
    tally = row.harness(bench, row.ci, 1)
    print(tally)
    tally.require(row.ci)
