"""Files larger than 31 and 32 bits count, and runs in exactly the memory that was announced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hostile import memory, offsets
from tests.hostile.warm import Warm

pytestmark = pytest.mark.long  # minutes of processor time: python -m pytest -m long

CI_RUNS = ("merge", "merge, quantised", "merge, method", "merge, sharded", "lora bake")


def test_tensors_beyond_31_and_32_bits_are_read_by_commands(warm: Warm, tmp_path: Path) -> None:
    offsets.run(warm, tmp_path, ["merge"]).require(12)


@pytest.mark.parametrize("length", offsets.LENGTHS)
def test_both_ends_of_a_tensor_of_billions_of_elements_are_read(tmp_path: Path, length: int) -> None:
    with offsets.long_tensor(tmp_path / "m.safetensors", length) as path:
        assert offsets.read_ends(path, length) == [1, 1, 2, 2, 3, 3]


def test_a_run_needs_no_more_memory_than_was_said(warm: Warm, tmp_path: Path) -> None:
    """The inputs are sparse files of 380 MB each, more than four times the limit together."""

    def figure(line: list[str], folder: Path) -> int:
        return int(json.loads(warm.run([*line, "--dry-run", "--json"], folder).out)["memory"])

    runs = [run for run in memory.RUNS if run.name in CI_RUNS]
    memory.run(tmp_path, 45, runs, figure=figure).require(len(CI_RUNS))


def test_half_of_that_memory_is_not_enough(tmp_path: Path) -> None:
    """Otherwise the limit would prove nothing."""
    found = memory.run(tmp_path, 4, memory.RUNS[:1], figure=lambda line, folder: 250_000_000, share=0.5)
    assert "killed" in found.violations[0]
