"""Read files into the page cache before they are needed, while the program does other work."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from mergetool.checkpoint import system
from mergetool.checkpoint.inputs import UNREADABLE, InputFile

PIECE = 32 << 20
"""Bytes of a file that are read in one call, which holds no lock of the interpreter: a thread that wants it back waits for those that compute."""
ROOM = 640 << 20
"""Bytes that are read but not used yet: a fast disk gives them in a fifth of a second, while a command imports and
plans before it uses the first. With 384 MiB the disk then stood still for a tenth of one (2 cores, AMD EPYC 9005).
More makes the page cache take fresh pages, which a virtual machine must get from its host: with 2 GiB, comparing two
files of 12.3 GB took 14 s instead of 10.3 to 11.9 (2 cores, AMD EPYC 7003)."""
READERS = 2
"""Threads. One keeps a disk busy while nothing else runs, but not beside threads that compute: it waits for a core after every piece.
The same took 12.5 s with one and 10.3 to 11.9 with two, reading alone 8.7."""


def give_way() -> None:
    """Lower this thread's priority, so that reading threads get a core at once.

    Call it first in threads that compute beside a `ReadAhead`; else the disk waits until a computing thread's slice is
    over. Only Linux has a niceness for each thread. It is a hint that never fails.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + 10))


class ReadAhead:
    """Reads files in threads of its own, piece by piece in turn. It ends when all is read or the ``with`` block ends.

    It never is more than ``room`` bytes ahead of what was `used`, so that nothing that is still to be used is pushed out of memory. It is
    a hint: what cannot be read is left to whoever needs it, and tells of it.
    """

    def __init__(self, files: Sequence[InputFile], *, room: int | None = None) -> None:
        self._files = list({file.identity: file for file in files}.values())
        self._room = min(ROOM, (system.main_memory() or ROOM) // 16) if room is None else room
        self._ahead = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._pieces = self._in_turn()
        self._threads = [threading.Thread(target=self._run, name="read-ahead", daemon=True) for _ in range(READERS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def used(self, count: int) -> None:
        """So many bytes of the files were used."""
        with self._changed:
            self._ahead -= count
            self._changed.notify_all()

    def _in_turn(self) -> Iterator[tuple[InputFile, int, int]]:
        """All pieces: file, place and size."""
        for start in range(0, max((file.size for file in self._files), default=0), PIECE):
            for file in self._files:
                if start < file.size:
                    yield file, start, min(PIECE, file.size - start)

    def _run(self) -> None:
        with suppress(*UNREADABLE):
            while (piece := self._next()) is not None:
                file, start, size = piece
                if not file.bring(start, size):
                    return

    def _next(self) -> tuple[InputFile, int, int] | None:
        """Wait for room for the next piece, past those that were used before they were read ahead, and may have left memory again."""
        with self._changed:
            for piece in self._pieces:
                self._changed.wait_for(lambda: self._stopped or self._ahead < self._room)
                if self._stopped:
                    break
                self._ahead += piece[2]
                if self._ahead > 0:
                    return piece
        return None
