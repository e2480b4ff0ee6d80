"""One buffer, shared out in regions that come back in nearly the order they were taken."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

ALIGNMENT = 16
"""Every region begins at a multiple of this many bytes and is a multiple of it long."""


def aligned(size: int) -> int:
    """Round ``size`` up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False, slots=True)
class Region:
    """Bytes ``[start, start + size)`` of the buffer."""

    start: int
    size: int
    returned: bool = False


class Ring:
    """Keeps track of the free bytes in a buffer of ``capacity``. One thread takes regions, any thread gives them back.

    Small regions cost what they are large: of a model's tensors half are vectors, and with room for six jobs of the largest size three
    were vectors at times, and too little was being read.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._taken: deque[Region] = deque()  # in the order of the buffer, from the oldest
        self._changed = threading.Condition()

    def take(self, size: int, *, wait: bool = False) -> Region | None:
        """Take a region of at least ``size`` bytes. None when there is no room now, unless ``wait`` is set.

        Raises ValueError for what is larger than the buffer.
        """
        size = aligned(max(size, 1))
        if size > self._capacity:
            raise ValueError(f"a region of {size} bytes in a ring of {self._capacity}")
        with self._changed:
            while (start := self._place(size)) is None:
                if not wait:
                    return None
                self._changed.wait()
            region = Region(start, size)
            self._taken.append(region)
            return region

    def give_back(self, region: Region) -> None:
        """Its bytes are free, once those taken before it are given back too."""
        with self._changed:
            region.returned = True
            while self._taken and self._taken[0].returned:
                self._taken.popleft()
            self._changed.notify()

    def _place(self, size: int) -> int | None:
        if not self._taken:
            return 0
        tail, newest = self._taken[0].start, self._taken[-1]
        head = newest.start + newest.size
        if newest.start < tail:  # what is taken goes round the end
            return head if head + size <= tail else None
        if head + size <= self._capacity:
            return head
        return 0 if size <= tail else None
