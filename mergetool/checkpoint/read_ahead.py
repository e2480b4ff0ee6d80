"""Reading files into the page cache before they are asked for, while the program does something else."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from mergetool.checkpoint import system
from mergetool.checkpoint.inputs import InputFile

PIECE = 8 << 20
"""Bytes of a file that are read in one call, which holds no lock of the interpreter."""
ROOM = 256 << 20
"""Bytes that are read but not used yet: what a fast disk gives in a tenth of a second. More makes the page cache take fresh pages, which a virtual machine
must get from its host: of 24.6 GB, 64 MiB ahead took 13.5 to 15.4 s, 128 to 512 MiB 12.4 to 13.5, and 3 GiB 13 (2 cores, AMD EPYC 9004)."""


class ReadAhead:
    """Reads files, piece by piece in turn, from a thread of its own, until all is read or the ``with`` block is left.

    It never is more than ``room`` bytes ahead of what was `used`, so that nothing that is still to be used is pushed out of memory. It is
    a hint: what cannot be read is left to whoever needs it, and tells of it.
    """

    def __init__(self, files: Sequence[InputFile], *, room: int | None = None) -> None:
        self._files = list({file.identity: file for file in files}.values())
        self._room = min(ROOM, (system.main_memory() or ROOM) // 16) if room is None else room
        self._ahead = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    def used(self, count: int) -> None:
        """So many bytes of the files were used."""
        with self._changed:
            self._ahead -= count
            self._changed.notify()

    def _run(self) -> None:
        longest = max((file.size for file in self._files), default=0)
        with suppress(OSError):
            for start in range(0, longest, PIECE):
                for file in self._files:
                    size = min(PIECE, file.size - start)
                    if size > 0 and self._is_wanted(size) and not file.bring(start, size):
                        return
                    if self._stopped:
                        return

    def _is_wanted(self, size: int) -> bool:
        """Wait for room for the next piece; False for one that was used before it was read ahead, and may have left memory again."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ahead < self._room)
            self._ahead += size
            return not self._stopped and self._ahead > 0
