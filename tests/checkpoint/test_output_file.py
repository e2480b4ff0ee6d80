"""What an output leaves in the page cache: nothing, unless it is small. The kernel counts the pages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mergetool.checkpoint import output_file
from mergetool.checkpoint.output_file import KEPT_BEHIND, OutputFile
from tests.pages import cached, uncache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no call of this system lets pages go")

BLOCK = 1 << 18
SIZE = (KEPT_BEHIND + 24) * BLOCK


def written(path: Path) -> OutputFile:
    out = OutputFile(path, path, SIZE)
    for at in range(0, SIZE, BLOCK):
        out.write(at, memoryview(bytes(BLOCK)))
        out.flush_behind(at, BLOCK)
    return out


def require_a_disk(folder: Path) -> None:
    probe = folder / "probe"
    probe.write_bytes(bytes(BLOCK))
    uncache(probe)


def test_an_output_is_not_in_the_page_cache_when_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_a_disk(tmp_path)
    monkeypatch.setattr(output_file, "SMALL", SIZE - 1)
    written(tmp_path / "out").finish()
    assert cached(tmp_path / "out") == 0


def test_a_small_output_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_file, "SMALL", SIZE)
    written(tmp_path / "out").finish()
    assert cached(tmp_path / "out") == 1


def test_what_is_on_the_disk_is_let_go_of_while_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Synced after every block, so that the test does not depend on how fast the disk is."""
    require_a_disk(tmp_path)
    monkeypatch.setattr(output_file, "SMALL", SIZE - 1)
    out = OutputFile(tmp_path / "out", tmp_path / "out", SIZE)
    for at in range(0, SIZE, BLOCK):
        out.write(at, memoryview(bytes(BLOCK)))
        out.sync()
        out.flush_behind(at, BLOCK)
    assert cached(tmp_path / "out") == KEPT_BEHIND * BLOCK / SIZE
    out.abandon()
