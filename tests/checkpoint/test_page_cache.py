"""What of a file stays in the page cache after it was streamed: what was there before, and nothing else. The kernel counts the pages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergetool.checkpoint import page_cache, system
from mergetool.checkpoint.inputs import InputFile
from tests.pages import cached, uncache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no call of this system lets pages go")

BLOCK = 1 << 20
BLOCKS = 8
Read = Callable[[InputFile, int, int], object]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of eight blocks and a bit that is not in the page cache."""
    monkeypatch.setattr(page_cache, "BLOCK", BLOCK)
    path = tmp_path / "model"
    path.write_bytes(os.urandom(BLOCKS * BLOCK + 12_345))
    uncache(path)
    return path


def into_buffer(file: InputFile, offset: int, size: int) -> None:
    file.read_into(memoryview(bytearray(size)), offset)


def through_window(file: InputFile, offset: int, size: int) -> None:
    file.window(offset, size).release()


READS = pytest.mark.parametrize("read", [into_buffer, through_window])


def stream(file: InputFile, read: Read, size: int = BLOCK // 4) -> None:
    for start in range(0, file.size, size):
        count = min(size, file.size - start)
        read(file, start, count)
        file.release(start, count)


@READS
@pytest.mark.parametrize("share", [0.25, 1, 3.5])
def test_what_was_not_there_is_not_there_afterwards(path: Path, read: Read, share: float) -> None:
    """A merge method reads a whole parameter at once, which may be many blocks."""
    with InputFile.open(path) as file:
        stream(file, read, int(share * BLOCK))
        assert cached(path, 0, (BLOCKS - 5) * BLOCK) == 0, "behind the reading, not only at the end"
    assert cached(path) == 0


@READS
def test_a_file_that_was_there_stays(path: Path, read: Read) -> None:
    path.read_bytes()
    with InputFile.open(path) as file:
        stream(file, read)
    assert cached(path) == 1


@READS
def test_the_half_of_a_file_that_was_there_stays(path: Path, read: Read) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read on behind it
    os.pread(fd, 4 * BLOCK, 2 * BLOCK)
    os.close(fd)
    with InputFile.open(path) as file:
        stream(file, read)
    assert cached(path, 2 * BLOCK, 4 * BLOCK) == 1
    assert cached(path, 0, 2 * BLOCK) == 0
    assert cached(path, 6 * BLOCK) == 0


def test_what_is_read_without_being_released_stays(path: Path) -> None:
    """A header that is looked at, a model that is loaded: who reads it again soon finds it."""
    with InputFile.open(path) as file:
        file.read(0, file.size)
    assert cached(path) == 1


def test_what_a_run_itself_brought_does_not_count_as_there_before(path: Path) -> None:
    with InputFile.open(path) as first:
        first.bring(0, first.size)
        assert cached(path) == 1
        with InputFile.open(path) as second:
            stream(second, into_buffer)
    assert cached(path) == 0


def test_a_file_that_was_closed_for_others_lets_go_as_well(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "most_open_files", lambda: 1)
    with InputFile.open(path) as file:
        stream(file, into_buffer)
        others = [InputFile.open(path) for _ in range(20)]
        assert file._fd < 0
        assert cached(path) == 0
        for other in others:
            other.close()


def test_files_are_asked_about_by_mincore_where_there_is_no_cachestat(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(system.NATIVE, "syscall")
    with InputFile.open(path) as file:
        stream(file, into_buffer)
    assert cached(path) == 0
    path.read_bytes()
    with InputFile.open(path) as file:
        stream(file, into_buffer)
    assert cached(path) == 1


def test_both_ways_of_asking_count_the_same_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.pread(fd, 3 * BLOCK, BLOCK)
    share = cached(path)
    pages = -(-path.stat().st_size // os.sysconf("SC_PAGE_SIZE"))
    assert 0 < share < 1
    assert system._mincore(fd, 0, path.stat().st_size) / pages == share
    try:
        counted = system._cachestat(fd, 0, path.stat().st_size)
    except OSError:
        pytest.skip("this kernel has no cachestat")
    finally:
        os.close(fd)
    assert counted / pages == share


def test_nothing_is_let_go_where_the_system_does_not_say_what_was_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "NATIVE", {})
    with InputFile.open(path) as file:
        stream(file, into_buffer)
    assert cached(path) == 1
