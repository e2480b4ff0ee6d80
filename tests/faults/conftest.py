"""One warm program for all harnesses of a test process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.rows import Bench, why_not_here


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """Where harnesses work. Skips where they cannot; CI fails on a skip."""
    reason = why_not_here()
    if reason is not None:
        pytest.skip(reason)
    with Bench() as made:
        yield made
