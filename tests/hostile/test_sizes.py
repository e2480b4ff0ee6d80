"""Files larger than 31 and 32 bits count, and runs in exactly the memory that was announced."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile import memory, offsets
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm


def test_tensors_beyond_31_and_32_bits_are_read_by_commands(warm: Warm, tmp_path: Path) -> None:
    offsets.run(warm, tmp_path, ["merge"]).require(12)


@pytest.mark.parametrize("length", offsets.LENGTHS)
def test_both_ends_of_a_tensor_of_billions_of_elements_are_read(tmp_path: Path, length: int) -> None:
    with offsets.long_tensor(tmp_path / "m.safetensors", length) as path:
        assert offsets.read_ends(path, length) == [1, 1, 2, 2, 3, 3]


@pytest.mark.first
@pytest.mark.usefixtures("cgroup")
def test_a_run_needs_no_more_memory_than_was_said(warm: Warm, tmp_path: Path) -> None:
    memory.every(warm, tmp_path).require(len(memory.SOME) + 2)


@pytest.mark.usefixtures("cgroup")
def test_half_of_that_memory_is_not_enough(warm: Warm, tmp_path: Path) -> None:
    """Otherwise the limit would prove nothing. Of a command that has to import torch; others may come to need it and mostly do not."""
    tally = Tally("16", "half of the memory")
    with_torch = [run for run in memory.KINDS if run.name == "lora bake"]
    memory.run(warm, tmp_path, with_torch, memory.SHAPES["even"], tally, share=0.5)
    assert "exit -9" in tally.violations[0]
