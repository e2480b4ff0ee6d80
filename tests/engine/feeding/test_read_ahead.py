"""Files read into the page cache before they are asked for. What is in the cache is asked of the kernel (mincore)."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergetool.checkpoint.inputs import InputFile
from mergetool.engine.feeding.read_ahead import PIECE, ReadAhead, give_way
from tests.pages import cached, uncache
from tests.patience import HANG

pytestmark = pytest.mark.loaded

SIZE = 5 * PIECE

linux = pytest.mark.xfail(sys.platform != "linux", reason="no call of this system brings pages without copying them")


@pytest.fixture
def file(tmp_path: Path) -> InputFile:
    """A file of five pieces that is not in the page cache."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(os.urandom(1 << 20) * (SIZE >> 20))
    uncache(path)
    return InputFile.open(path)


def wait_until(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + HANG
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@linux
def test_a_file_is_in_the_cache_before_it_is_asked_for(file: InputFile) -> None:
    before = cached(file.path)
    with file, ReadAhead([file], room=2 * SIZE):
        assert wait_until(lambda: cached(file.path) == 1)
    assert before == 0


@linux
def test_it_stays_no_further_ahead_than_it_may_and_goes_on_when_bytes_were_used(file: InputFile) -> None:
    with file, ReadAhead([file], room=PIECE) as ahead:
        assert wait_until(lambda: cached(file.path, 0, PIECE) == 1)
        time.sleep(0.2)
        # the kernel's own reading ahead, up to 8 MiB here, comes on top
        assert cached(file.path, 4 * PIECE, PIECE) == 0
        for _ in range(5):
            ahead.used(PIECE)
            time.sleep(0.05)
        assert wait_until(lambda: cached(file.path, 4 * PIECE, PIECE) == 1)


@linux
def test_what_was_used_before_it_was_read_ahead_is_not_read_again(file: InputFile) -> None:
    ahead = ReadAhead([file], room=2 * SIZE)
    ahead.used(2 * SIZE)
    with file, ahead:
        time.sleep(0.3)
    assert cached(file.path) == 0


def test_leaving_the_block_ends_a_thread_that_waits(file: InputFile) -> None:
    with file, ReadAhead([file], room=1):
        time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def test_a_file_that_cannot_be_read_is_left_to_who_needs_it(file: InputFile) -> None:
    file.close()
    with ReadAhead([file], room=SIZE):
        time.sleep(0.05)


def test_a_file_named_twice_is_read_once(file: InputFile, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[tuple[int, int]] = []

    def bring(self: InputFile, offset: int, size: int) -> bool:
        brought.append((offset, size))
        return True

    monkeypatch.setattr(InputFile, "bring", bring)
    with file, InputFile.open(file.path) as again, ReadAhead([file, again], room=2 * SIZE):
        assert wait_until(lambda: len(brought) >= 5)
        time.sleep(0.05)
    assert sum(size for _, size in brought) == SIZE


@linux
def test_a_thread_gives_way_alone() -> None:
    found: list[int] = []

    def look() -> None:
        give_way()
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    before = os.getpriority(os.PRIO_PROCESS, 0)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [min(19, before + 10)]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
