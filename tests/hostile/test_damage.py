"""What `verify` is for: nothing that was changed after a merge passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import MergetoolError
from tests.hostile import damage


@pytest.mark.first
def test_every_damage_is_found(tmp_path: Path) -> None:
    damage.run(tmp_path, 2000).require(2200)


def test_replay_finds_every_damage_too(tmp_path: Path) -> None:
    damage.run(tmp_path, 300, look=damage.replayed).require(330)


def test_a_check_of_names_and_sizes_only_is_caught(tmp_path: Path) -> None:
    def lax(path: str) -> bool:
        try:
            with Checkpoint.open(path) as checkpoint:
                return len(checkpoint.tensors) != 6
        except MergetoolError:
            return True

    assert len(damage.run(tmp_path, 60, look=lax).violations) > 20
