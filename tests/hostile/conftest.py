"""One warm process for all harnesses that run commands: starting it takes longer than a hundred runs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest

from tests.hostile import memory
from tests.hostile.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A server that may reach for the Hub, which no file may make it do."""
    with Warm(environment={"HF_HUB_OFFLINE": "0"}) as server:
        yield server


@pytest.fixture
def strace() -> None:
    """Skips where no program can be watched; CI fails on a skip."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")


@pytest.fixture
def cgroup() -> None:
    """Skips where memory cannot be limited; CI fails on a skip."""
    if not os.access(memory.CGROUP, os.W_OK):
        pytest.skip("there is no memory cgroup (v1) that may be written")
