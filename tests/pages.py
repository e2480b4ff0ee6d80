"""Which pages of a file are in the page cache, asked of the kernel by mincore, and files that have none there."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest


def cached(path: Path, start: int = 0, size: int | None = None) -> float:
    """The share of these bytes, from a page's start on, that is in the page cache."""
    size = path.stat().st_size - start if size is None else size
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        pages = -(-size // mmap.PAGESIZE)
        told = (ctypes.c_ubyte * pages)()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) + start
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), told) == 0
        return sum(each & 1 for each in told) / pages


def uncache(*paths: Path) -> None:
    """Put files on the disk and out of the page cache; skips the test where they cannot be."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        if cached(path):
            pytest.skip("the temporary folder is in memory, or its pages cannot be let go")
