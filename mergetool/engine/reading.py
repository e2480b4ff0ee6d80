"""How a worker gets at stored bytes: windows on a mapping, or positioned reads into its own buffers.

Both give the same bytes. Windows save a copy; positioned reads work everywhere, and on network file systems are the
only safe way, since a file cut short under a mapping ends the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from mergetool.adapters.rows import TILE_ROWS, StackedRows
from mergetool.checkpoint import system
from mergetool.checkpoint.dtypes import F32, DType
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.reader import Checkpoint
from mergetool.ops.blending import blend
from mergetool.ops.stored import Stored
from mergetool.quant.encoding import Encoding, Floats
from mergetool.recipe.steps import COPY, Window

Method = Literal["auto", "mmap", "pread"]

FORGOTTEN_AT_ONCE = 32 << 20
"""Bytes. Comparing two files of 12.3 GB took 11.2 s with 2 MiB, 7.8 to 8.2 with 8 and 7.9 with 32 or 64; merging three into one 25 s without letting go,
16.1 with 16 MiB, 16.0 with 32 and 16.9 with 64 (2 cores, AMD EPYC 9005, 24 GB)."""


class Fetcher(Protocol):
    """One worker's way of reading; not shared between threads."""

    def fetch(self, slot: int, file: InputFile, offset: int, size: int) -> memoryview:
        """``size`` bytes of ``file``; valid until ``release`` or the next fetch into the same slot."""

    def release(self, file: InputFile, offset: int, size: int) -> None:
        """The bytes are no longer needed."""


class WindowFetcher:
    """Windows on the file's mapping, populated in one call and given back after use. ``forgetful`` as for `PositionedFetcher`."""

    def __init__(self, *, forgetful: bool = False) -> None:
        self._forgetful = forgetful

    def fetch(self, slot: int, file: InputFile, offset: int, size: int) -> memoryview:
        return file.window(offset, size)

    def release(self, file: InputFile, offset: int, size: int) -> None:
        file.drop(offset, size)
        if self._forgetful:
            _forget_blocks(file, offset, size)


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
        if self._forgetful:
            _forget_blocks(file, offset, size)


def _forget_blocks(file: InputFile, offset: int, size: int) -> None:
    """Let go of the blocks that end in what was read: by whole aligned ones, since the kernel keeps its large folios while any page of them is wanted."""
    boundary = (offset + size) // FORGOTTEN_AT_ONCE * FORGOTTEN_AT_ONCE
    start = offset // FORGOTTEN_AT_ONCE * FORGOTTEN_AT_ONCE
    if boundary > start:
        file.forget(start, boundary - start)


def too_large(size: int) -> bool:
    """True when files of ``size`` bytes leave less than a quarter of the memory to everything else, so that none can stay cached."""
    memory = system.main_memory()
    return memory is not None and size > 3 * memory // 4


def fetcher(method: Method, files: Sequence[InputFile], *, buffered: bool = False) -> Fetcher:
    """The reading method asked for; ``auto`` is windows where every file can be mapped, unless ``buffered`` asks for buffers.

    What is decoded, and what is collected before it is quantised, wants buffers: those stay in the cache, where a mapping's fresh small pages beside so much memory
    do not. Three BF16 files of 12.3 GB to scaled FP8 took 18.3 to 20.8 s by windows and 15.0 to 15.3 by buffers, three scaled FP8 files of 7 GB 18.3 to 18.9 and 14.8; from BF16 to
    BF16 both ways took 14.8 to 15.6 s (2 cores, AMD EPYC 9005, 24 GB, cold).
    """
    forgetful = too_large(sum(file.size for file in files))
    if method == "mmap" or (method == "auto" and not buffered and all(file.can_map for file in files)):
        return WindowFetcher(forgetful=forgetful)
    return PositionedFetcher(forgetful=forgetful)


Place = tuple[InputFile, int, int]


@dataclass(frozen=True, slots=True)
class Fetched:
    """``count`` elements in reach from ``start`` of a window on: ``raw`` are the stored bytes, from ``places``."""

    window: Window
    start: int
    count: int
    places: tuple[Place, ...]
    raw: tuple[memoryview, ...]

    @property
    def dtype(self) -> DType:
        """What the elements are, or are decoded to."""
        return self.window.dtype

    @property
    def is_plain(self) -> bool:
        """Whether ``raw[0]`` holds the elements as ``dtype``."""
        return self.window.encoding is None

    @property
    def stored(self) -> Stored | None:
        """The elements as they are stored, with the scale that they have in common; None where they must be decoded."""
        encoding = self.window.encoding
        if encoding is None:
            return Stored(self.raw[0], self.dtype)
        scaled = encoding.scaled(self.raw)
        if scaled is None:
            return None
        codes, dtype, scale = scaled
        first, _ = _rows(encoding, self.start, self.count)
        begin = self.start - first * encoding.width
        return Stored(codes[begin * dtype.itemsize : (begin + self.count) * dtype.itemsize], dtype, scale)

    def decode(self, out: Floats) -> None:
        """Write the values of a quantised window's elements into ``out`` [count]."""
        encoding = self.window.encoding
        assert encoding is not None
        if blend(COPY, [self.stored], F32, out.data.cast("B")):
            return
        first, last = _rows(encoding, self.start, self.count)
        begin, size = self.start - first * encoding.width, (last - first) * encoding.width
        whole = out if size == self.count else np.empty(size, np.float32)
        rows = whole.reshape(-1, encoding.width)
        if isinstance(encoding, StackedRows):
            _multiply(encoding, self.window.row + first, rows)
        else:
            encoding.decode(self.raw, self.window.row + first, last - first, rows)
        if whole is not out:
            out[:] = whole[begin : begin + self.count]

    @property
    def nbytes(self) -> int:
        """Stored bytes read."""
        return sum(size for _, _, size in self.places)


class ValueReader:
    """One worker's way to the elements of windows, wherever their bytes lie."""

    def __init__(self, fetch: Fetcher) -> None:
        self._fetch = fetch

    def fetch(self, slot: int, checkpoint: Checkpoint, window: Window, start: int, count: int) -> Fetched:
        """Elements ``[start, start + count)`` of a window; valid until `release`, or the next fetch into the same slot."""
        places = self._places(checkpoint, window, start, count)
        raw = tuple(self._fetch.fetch(_SPANS * slot + i, *place) for i, place in enumerate(places))
        return Fetched(window, start, count, places, raw)

    def release(self, fetched: Fetched) -> None:
        """The elements are no longer needed."""
        for view in fetched.raw:
            view.release()
        for place in fetched.places:
            self._fetch.release(*place)

    @staticmethod
    def _places(checkpoint: Checkpoint, window: Window, start: int, count: int) -> tuple[Place, ...]:
        encoding = window.encoding
        if encoding is None:
            file, base = checkpoint.locate(window.tensor)
            bits = window.dtype.bits
            begin, end = start * bits // 8, -(-(start + count) * bits // 8)
            return ((file, base + window.start + begin, end - begin),)
        first, last = _rows(encoding, start, count)
        places = []
        for span in encoding.spans(window.row + first, last - first):
            file, base = checkpoint.locate(span.tensor)
            places.append((file, base + span.start, span.size))
        return tuple(places)


def _multiply(encoding: StackedRows, row: int, out: Floats) -> None:
    """What LoRAs add to rows from ``row`` on, by tiles of `TILE_ROWS`: torch, whose threads a run has under control."""
    import torch  # takes a second to import, and a model without LoRAs can be read without it

    up, down = (torch.from_numpy(factor) for factor in encoding.factors())
    for at in range(0, len(out), TILE_ROWS):
        count = min(TILE_ROWS, len(out) - at)
        torch.mm(up[row + at : row + at + count], down, out=torch.from_numpy(out[at : at + count]))


def _rows(encoding: Encoding, start: int, count: int) -> tuple[int, int]:
    """The rows that elements ``[start, start + count)`` lie in, first and behind the last."""
    return start // encoding.width, -(-(start + count) // encoding.width)


_SPANS = 8
