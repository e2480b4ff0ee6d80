"""The same bytes whatever the machine looks like."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile.determinism import matrix


@pytest.fixture
def memory_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in memory where there is one: each of the 500 runs syncs its output."""
    monkeypatch.setenv("LOCPATH", "")  # put back after the test
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.first
def test_one_digest_a_command_under_all_conditions(memory_folder: Path) -> None:
    matrix(memory_folder).require(500)


def test_a_program_that_writes_where_it_ran_is_caught(memory_folder: Path) -> None:
    found = matrix(memory_folder, commands=["convert"], processes=1, patched="write the folder")
    assert found.violations
    assert all("another digest" in violation for violation in found.violations)
