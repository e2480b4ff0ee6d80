"""One warm program for all harnesses of a test process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.rows import Bench, why_not_here


@contextmanager
def standing() -> Iterator[Bench]:
    """A bench to work on. Skips where harnesses cannot run; CI fails on a skip."""
    reason = why_not_here()
    if reason is not None:
        pytest.skip(reason)
    with Bench() as made:
        yield made


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """Where harnesses work that leave everything as it was."""
    with standing() as made:
        yield made
