"""Few open files for many: idle ones are closed, and opened again on demand.

macOS allows a program 256 open files by default, Linux 1,024, while three models of a few hundred shards are a merge like any other.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from mergetool.checkpoint import system

LEAST = 8
"""Open files that a pool always allows: more than the threads that use one at a time would leave them waiting for each other's."""


class Pooled(ABC):
    """A file that a pool may close while nobody uses its descriptor. ``_fd`` is -1 while it is closed."""

    _fd: int
    _users = 0

    @abstractmethod
    def _open_again(self) -> int:
        """A new descriptor of the same file; raises where it is another one by now."""

    @abstractmethod
    def _park(self) -> None:
        """Close the descriptor, and its companion."""


class Pool:
    """The open files of one kind: a share ``1/part`` of the system's limit for the process.

    It holds `LEAST` files at least.
    """

    def __init__(self, part: int) -> None:
        self._part = part
        self._lock = threading.RLock()
        self._open: OrderedDict[int, Pooled] = OrderedDict()  # the least recently used in front

    def add(self, file: Pooled) -> None:
        """Count a file just opened, and close unused ones where there are too many."""
        with self._lock:
            self._open[id(file)] = file
            self._close_idle()

    def remove(self, file: Pooled) -> int:
        """Take a file out for good; its descriptor, -1 where it was closed."""
        with self._lock:
            self._open.pop(id(file), None)
            fd, file._fd = file._fd, -1
            return fd

    @contextmanager
    def using(self, file: Pooled) -> Iterator[int]:
        """The file's descriptor, which stays open within the block."""
        with self._lock:
            if file._fd < 0:
                file._fd = file._open_again()
            file._users += 1
            self._open[id(file)] = file
            self._open.move_to_end(id(file))
            self._close_idle()
            fd = file._fd
        try:
            yield fd
        finally:
            with self._lock:
                file._users -= 1

    def _close_idle(self) -> None:
        most = max(LEAST, system.most_open_files() // self._part)
        for key, file in list(self._open.items()) if len(self._open) > most else ():
            if file._users == 0 and len(self._open) > most and key != next(reversed(self._open)):
                del self._open[key]
                file._park()
