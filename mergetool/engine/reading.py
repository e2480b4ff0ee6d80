"""How a worker gets at stored bytes: windows on a mapping, or positioned reads into its own buffers.

Both give the same bytes. Windows save a copy; positioned reads work everywhere, and on network file systems are the
only safe way, since a file cut short under a mapping ends the process.
"""

from __future__ import annotations

from typing import Literal, Protocol

from mergetool.checkpoint.inputs import InputFile

Method = Literal["auto", "mmap", "pread"]

FORGOTTEN_AT_ONCE = 64 << 20


class Fetcher(Protocol):
    """One worker's way of reading; not shared between threads."""

    def fetch(self, slot: int, file: InputFile, offset: int, size: int) -> memoryview:
        """``size`` bytes of ``file``; valid until ``release`` or the next fetch into the same slot."""

    def release(self, file: InputFile, offset: int, size: int) -> None:
        """The bytes are no longer needed."""


class WindowFetcher:
    """Windows on the file's mapping, populated in one call and given back after use."""

    def fetch(self, slot: int, file: InputFile, offset: int, size: int) -> memoryview:
        return file.window(offset, size)

    def release(self, file: InputFile, offset: int, size: int) -> None:
        file.drop(offset, size)


class PositionedFetcher:
    """Positioned reads into buffers that are reused, one for each operand.

    A ``forgetful`` one lets what it has read go from the page cache: when the files do not fit there anyway, that saves
    the kernel the search for pages to reclaim, which took longer here than the reading.
    """

    def __init__(self, *, forgetful: bool = False) -> None:
        self._buffers: dict[int, bytearray] = {}
        self._forgetful = forgetful

    def fetch(self, slot: int, file: InputFile, offset: int, size: int) -> memoryview:
        buffer = self._buffers.get(slot)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[slot] = bytearray(size)
        view = memoryview(buffer)[:size]
        file.read_into(view, offset)
        return view

    def release(self, file: InputFile, offset: int, size: int) -> None:
        # By whole aligned blocks: the kernel keeps its large folios while any page of them is still wanted.
        boundary = (offset + size) // FORGOTTEN_AT_ONCE * FORGOTTEN_AT_ONCE
        if self._forgetful and boundary > offset:
            file.forget(max(0, boundary - FORGOTTEN_AT_ONCE), FORGOTTEN_AT_ONCE)


def fetcher(method: Method, files: list[InputFile]) -> Fetcher:
    """The reading method asked for; ``auto`` is windows where every file can be mapped."""
    if method == "pread":
        return PositionedFetcher()
    if method == "mmap" or all(file.can_map for file in files):
        return WindowFetcher()
    return PositionedFetcher()
