"""No file costs more than 2 GiB, or goes on for ever, to be refused, or to be read."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.hostile import bombs

pytestmark = pytest.mark.loaded


@pytest.mark.first
def test_every_bomb_is_refused_or_done_in_time_and_memory(tmp_path: Path) -> None:
    quick = [bomb for bomb in bombs.BOMBS if not bomb.is_slow]
    bombs.run(tmp_path, quick).require(30)


def test_a_reader_that_believes_a_length_is_caught(tmp_path: Path) -> None:
    bomb = bombs.Bomb("3 GiB announced", "trusting", lambda path: path.write_bytes(struct.pack("<Q", 3 << 30)))
    assert bombs.run(tmp_path, [bomb]).violations
