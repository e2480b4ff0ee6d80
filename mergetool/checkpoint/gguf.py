"""The GGUF header: names, types and places of tensors.

The layout is ggml's ``gguf.h`` (versions 2 and 3, little-endian).

Quantised tensors appear as bytes, ``U8 [..., bytes of a row]``, with their block type beside them; what the blocks mean is ``quant``'s business.
Dimensions are stored with the fastest first and given here the usual way round.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import BY_CODE, DType
from mergetool.checkpoint.header import MAX_HEADER, TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import HeaderError

MAGIC = b"GGUF"

_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 8
_KEPT_ARRAY = 16
_SHORTEST_ENTRY = 8 + 4 + 4 + 8  # name's length, number of dimensions, type, offset
_AGAIN = "download or convert it again"
_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_PLAIN: Mapping[int, DType] = {
    0: dtypes.F32,
    1: dtypes.F16,
    24: BY_CODE["I8"],
    25: BY_CODE["I16"],
    26: BY_CODE["I32"],
    27: BY_CODE["I64"],
    28: dtypes.F64,
    30: dtypes.BF16,
}


@dataclass(frozen=True, slots=True)
class BlockType:
    """A ggml block: ``block`` consecutive elements of a row in ``nbytes`` bytes."""

    name: str
    block: int
    nbytes: int


_BLOCKS: Mapping[int, BlockType] = {
    number: BlockType(name, block, nbytes)
    for number, name, block, nbytes in (
        *((2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22), (7, "Q5_1", 32, 24)),
        *((8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84), (11, "Q3_K", 256, 110)),
        *((12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210), (15, "Q8_K", 256, 292)),
        *((16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98), (19, "IQ1_S", 256, 50)),
        *((20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82), (23, "IQ4_XS", 256, 136)),
        *((29, "IQ1_M", 256, 56), (34, "TQ1_0", 256, 54), (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17)),
        *((40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18)),
    )
}


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised GGUF tensor: its block type, its shape, and the values in a stored row.

    The shape is that of the values.
    """

    kind: BlockType
    shape: tuple[int, ...]
    width: int


@dataclass(frozen=True)
class GgufHeader:
    """The table of a GGUF file. ``tensors`` is in file order, without overlaps and inside the file; ``packed`` has the quantised ones.

    ``metadata`` holds the scalar and short keys as text.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    packed: Mapping[str, Packed] = field(default_factory=dict)

    @classmethod
    def read(cls, read: Callable[[int, int], bytes], *, file_size: int, source: str) -> GgufHeader:
        """The header of a file of ``file_size`` bytes, of which ``read(offset, size)`` gives any.

        Raises HeaderError, naming ``source`` and the tensor, for any broken rule of the format, and for a big-endian file.
        """
        return _Parser(read, file_size, source).parse()


class _Parser:
    """Reads front to back, and checks every length against the rest of the file before it believes it."""

    def __init__(self, read: Callable[[int, int], bytes], file_size: int, source: str) -> None:
        self._read = read
        self._size = min(file_size, MAX_HEADER)
        self._file_size = file_size
        self._source = source
        self._buffer = b""
        self._at = 0

    def parse(self) -> GgufHeader:
        magic, version = self._take(4), self._number("I")
        if magic != MAGIC or version not in _VERSIONS:
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise self._broken(f"is {kind}, where a little-endian GGUF of version 2 or 3 is wanted")
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors * _SHORTEST_ENTRY > self._size or keys * 12 > self._size:
            raise self._broken(f"announces {tensors} tensors and {keys} keys, more than it has room for")
        values: dict[str, Any] = {}
        for _ in range(keys):
            name = self._string()
            if name in values:
                raise self._broken(f"has the key {quoted(name)} twice")
            values[name] = self._value(self._number("I"))
        entries = [self._entry() for _ in range(tensors)]
        return self._table(entries, values)

    def _table(self, entries: list[tuple[str, tuple[int, ...], int, int]], values: Mapping[str, Any]) -> GgufHeader:
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
            raise self._broken(f"has the alignment {str(alignment)[:20]}, where a power of two is wanted")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        packed: dict[str, Packed] = {}
        for name, stored, kind, begin in entries:
            if name in tensors:
                raise self._broken(f"lists tensor {quoted(name)} twice")
            shape = _original_shape(values.get(f"comfy.gguf.orig_shape.{name}"), stored)
            info = self._info(name, stored, shape, kind, begin)
            if kind in _BLOCKS:
                packed[name] = Packed(_BLOCKS[kind], shape, stored[-1])
            tensors[name] = info
        ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
        self._require_room(ordered, start)
        metadata = {name: str(value) for name, value in values.items() if value is not None}
        return GgufHeader(ordered, metadata, start, packed)

    def _info(self, name: str, stored: tuple[int, ...], shape: tuple[int, ...], kind: int, begin: int) -> TensorInfo:
        count = prod(stored)
        if kind in _PLAIN:
            return TensorInfo(_PLAIN[kind], shape, begin, begin + count * _PLAIN[kind].itemsize)
        if kind not in _BLOCKS:
            raise self._broken(f"has tensor {quoted(name)} of the unknown type {kind}; a newer mergetool may know it")
        block = _BLOCKS[kind]
        if not stored or stored[-1] % block.block:
            raise self._broken(
                f"has tensor {quoted(name)} of {block.name} with shape {list(stored)}, "
                f"where rows of whole blocks of {block.block} are wanted"
            )
        row = stored[-1] // block.block * block.nbytes
        return TensorInfo(BY_CODE["U8"], (*stored[:-1], row), begin, begin + count // block.block * block.nbytes)

    def _require_room(self, tensors: Mapping[str, TensorInfo], start: int) -> None:
        end = 0
        for name, info in tensors.items():
            if info.begin < end:
                raise self._broken(f"has tensor {quoted(name)} overlap the one before it")
            end = info.end
        if start + end > self._file_size:
            raise self._broken(f"is cut short: its header describes {start + end} bytes and it has {self._file_size}")

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        rank = self._number("I")
        if rank > _MOST_DIMENSIONS:
            raise self._broken(f"has tensor {quoted(name)} with {rank} dimensions")
        shape = tuple(self._number("Q") for _ in range(rank))[::-1]
        if any(size > 1 << 40 for size in shape) or prod(shape) > 1 << 50:
            raise self._broken(f"has tensor {quoted(name)} of shape {list(shape)}, which fits no disk")
        return name, shape, self._number("I"), self._number("Q")

    def _value(self, kind: int, *, depth: int = 0) -> Any:
        """A key's value; None for an array that is long or of strings, which nothing here needs."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth:
            raise self._broken(f"has a key of the unknown type {kind}")
        item, count = self._number("I"), self._number("Q")
        if count > self._size:
            raise self._broken(f"announces an array of {count} items, more than it has room for")
        if item in _SCALARS and count > _KEPT_ARRAY:
            self._take(struct.calcsize(f"<{_SCALARS[item]}") * count)
            return None
        items = [self._value(item, depth=1) for _ in range(count)]
        return items if count <= _KEPT_ARRAY and item in _SCALARS else None

    def _string(self) -> str:
        try:
            return self._take(self._number("Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken("has a name that is not UTF-8") from None

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > self._size:
            limit = "its end" if self._size == self._file_size else f"the limit of {MAX_HEADER} bytes"
            raise self._broken(f"has a header that goes beyond {limit}")
        if end > len(self._buffer):
            self._buffer = self._read(0, min(self._size, max(end, 2 * len(self._buffer), 1 << 20)))
        taken = self._buffer[self._at : end]
        self._at = end
        return taken

    def _broken(self, fault: str) -> HeaderError:
        return HeaderError(f'"{self._source}" {fault}; {_AGAIN}.')


def _original_shape(noted: Any, stored: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that ComfyUI's converter noted for a tensor it had to flatten, where it has as many elements."""
    if (
        isinstance(noted, list)
        and all(type(size) is int and size > 0 for size in noted)
        and prod(noted) == prod(stored)
    ):
        return tuple(noted)
    return stored
