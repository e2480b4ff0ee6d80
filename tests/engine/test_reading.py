"""What reading lets go of, when files are too large to stay in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergetool.checkpoint.inputs import InputFile
from mergetool.engine.reading import FORGOTTEN_AT_ONCE, PositionedFetcher, WindowFetcher


@pytest.mark.parametrize("fetcher", [PositionedFetcher, WindowFetcher])
@pytest.mark.parametrize("share", [0.25, 1, 3.5])
def test_every_whole_block_that_was_read_is_let_go(
    share: float, fetcher: type[PositionedFetcher | WindowFetcher], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge method reads a whole parameter at once, which may be many blocks."""
    gone = bytearray(7)
    block = FORGOTTEN_AT_ONCE

    def forget(self: InputFile, offset: int, size: int) -> None:
        assert (offset % block, size % block) == (0, 0)
        gone[offset // block : (offset + size) // block] = bytes([1]) * (size // block)

    monkeypatch.setattr(InputFile, "forget", forget)
    path = tmp_path / "model"
    with path.open("wb") as sparse:
        sparse.truncate(7 * block)
    fetch = fetcher(forgetful=True)
    size = int(share * block)
    with InputFile.open(path) as file:
        for start in range(0, 7 * block, size):
            fetch.fetch(0, file, start, size).release()
            fetch.release(file, start, size)
    assert all(gone)
