"""The number of threads of a run by default, and torch's threads inside each."""

from __future__ import annotations

import os
import threading
from types import TracebackType
from typing import Self

from mergetool.errors import UsageError

MOST = 256
"""The most threads of a run."""


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def asked(threads: int | None) -> int:
    """``threads``, or one for each processor by default. Raises UsageError for fewer than 1 or more than 256."""
    if threads is None:
        return default_threads()
    if not 1 <= threads <= MOST:
        raise UsageError(f"`threads` is {threads}, but has to be a whole number from 1 to {MOST}.")
    return threads


class TorchThreads:
    """Keeps torch to one thread in every thread that calls `one`, within the block.

    Threads that come after it have as many as before.

    For a pass that may have no need of torch, which takes a second to import: it is imported by the first `one`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: int | None = None

    def one(self) -> None:
        """Compute on one thread in this thread. New threads would take that over, until the block ends."""
        import torch

        with self._lock:
            if self._before is None:
                self._before = torch.get_num_threads()
            torch.set_num_threads(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            import torch

            torch.set_num_threads(self._before)
