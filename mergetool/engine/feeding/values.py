"""The elements of windows, by views of a mapping or by positioned reads.

Both give the same bytes. Windows save a copy; positioned reads work everywhere, and on network file systems are the
only safe way, since a file cut short under a mapping ends the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mergetool.adapters.rows import TILE_ROWS, StackedRows
from mergetool.checkpoint.dtypes import F32, DType
from mergetool.checkpoint.inputs import InputFile, Readable
from mergetool.checkpoint.reader import Checkpoint
from mergetool.ops.blend import blend
from mergetool.ops.stored import Stored
from mergetool.quant.encoding import Encoding, Floats
from mergetool.recipe.steps import COPY, Window

Reader = Literal["auto", "mmap", "pread"]
"""A way to read files: the best one, windows on a mapping, or positioned reads."""

FilePlace = tuple[Readable, int, int]


@dataclass(frozen=True, slots=True)
class Fetched:
    """``count`` elements of a window from ``start`` on. ``raw`` are the stored bytes, taken from ``places``."""

    window: Window
    start: int
    count: int
    places: tuple[FilePlace, ...]
    raw: tuple[memoryview, ...]

    @property
    def dtype(self) -> DType:
        """The dtype of the elements, decoded where they are quantised."""
        return self.window.dtype

    @property
    def is_plain(self) -> bool:
        """Whether ``raw[0]`` holds the elements as ``dtype``."""
        return self.window.encoding is None

    @property
    def stored(self) -> Stored | None:
        """The elements as stored, with their common scale; None where they must be decoded."""
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
    """One thread's way to the elements of windows of ``files``."""

    def __init__(self, files: Sequence[InputFile], reader: Reader = "auto", *, buffered: bool = False) -> None:
        """``auto`` is windows where every file can be mapped, unless ``buffered`` asks for buffers.

        What is decoded, and what is collected before it is quantised, wants buffers: those stay in the cache, where a mapping's fresh small pages
        beside so much memory do not. Three BF16 files of 12.3 GB to scaled FP8 took 18.3 to 20.8 s by windows and 15.0 to 15.3 by buffers, three scaled
        FP8 files of 7 GB 18.3 to 18.9 and 14.8; from BF16 to BF16 both ways took 14.8 to 15.6 s (2 cores, AMD EPYC 9005, 24 GB, cold).
        """
        self._maps = reader == "mmap" or (reader == "auto" and not buffered and all(file.can_map for file in files))
        self._buffers: dict[int, bytearray] = {}

    def fetch(self, slot: int, checkpoint: Checkpoint, window: Window, start: int, count: int) -> Fetched:
        """Fetch elements ``[start, start + count)`` of a window.

        They stay valid until `release` or the next fetch into the same slot.
        """
        places = self._places(checkpoint, window, start, count)
        raw = tuple(self._bytes(_SPANS * slot + i, *place) for i, place in enumerate(places))
        return Fetched(window, start, count, places, raw)

    def release(self, fetched: Fetched) -> None:
        """The elements are no longer needed."""
        for view in fetched.raw:
            view.release()
        for file, offset, size in fetched.places:
            file.release(offset, size)

    def _bytes(self, place: int, file: Readable, offset: int, size: int) -> memoryview:
        """``size`` bytes of ``file`` at ``offset``: a window, or read into the buffer of that place, which is used again and again."""
        if self._maps:
            return file.window(offset, size)
        buffer = self._buffers.get(place)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[place] = bytearray(size)
        view = memoryview(buffer)[:size]
        file.read_into(view, offset)
        return view

    @staticmethod
    def _places(checkpoint: Checkpoint, window: Window, start: int, count: int) -> tuple[FilePlace, ...]:
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
    """The change of LoRAs to rows from ``row`` on, by tiles of `TILE_ROWS`, with torch, whose threads a run has under control."""
    import torch  # takes a second to import, and a model without LoRAs can be read without it

    up, down = (torch.from_numpy(factor) for factor in encoding.factors())
    for at in range(0, len(out), TILE_ROWS):
        count = min(TILE_ROWS, len(out) - at)
        torch.mm(up[row + at : row + at + count], down, out=torch.from_numpy(out[at : at + count]))


def _rows(encoding: Encoding, start: int, count: int) -> tuple[int, int]:
    """The rows that elements ``[start, start + count)`` lie in, first and behind the last."""
    return start // encoding.width, -(-(start + count) // encoding.width)


_SPANS = 8
