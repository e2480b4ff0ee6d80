"""One warm process for all harnesses that run commands: starting it takes longer than a hundred runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.warm import Warm


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """A server that may reach for the Hub, which no file may make it do."""
    with Warm(environment={"HF_HUB_OFFLINE": "0"}) as server:
        yield server
