"""What an output that is being written keeps in the page cache."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from mergetool.checkpoint import output_file, system
from mergetool.checkpoint.output_file import KEPT_BEHIND, OutputFile

BLOCK = 1 << 16
SIZE = (KEPT_BEHIND + 4) * BLOCK


@pytest.mark.parametrize(("files", "let_go"), [(1, 0), (2, 4), (3, 4)])
def test_outputs_that_are_too_much_together_let_go_of_what_was_written(
    files: int, let_go: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep's four outputs of 6.2 GB took 46 s where each by itself was small enough to stay, and 22 s without them."""
    gone: list[int] = []
    monkeypatch.setattr(system, "main_memory", lambda: 6 * SIZE)
    monkeypatch.setattr(output_file, "_open", output_file._Open())
    monkeypatch.setattr(system, "forget", lambda fd, offset, size: gone.append(fd))
    with ExitStack() as stack:
        opened = [OutputFile(tmp_path / str(i), tmp_path / str(i), SIZE) for i in range(files)]
        for out in opened:
            stack.callback(out.abandon)
        for at in range(0, SIZE, BLOCK):
            for out in opened:
                out.write(at, memoryview(bytes(BLOCK)))
                out.flush_behind(at, BLOCK)
    assert len(gone) == files * let_go


def test_an_output_that_is_closed_counts_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "main_memory", lambda: 6 * SIZE)
    monkeypatch.setattr(output_file, "_open", output_file._Open())
    first, second = (OutputFile(tmp_path / name, tmp_path / name, SIZE) for name in "ab")
    assert output_file._open.are_large
    first.abandon()
    first.abandon()
    assert not output_file._open.are_large
    second.finish()
