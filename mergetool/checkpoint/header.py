"""The safetensors header: bytes of a stranger become a table whose offsets are facts.

Rules and verdicts are those of the safetensors library 0.8, which also reads an entry written as an array and a
dtype written as ``{"F32": null}``. Stricter here, because a file must not mean two things: a tensor name or
metadata key given twice and fields the format does not know are refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import Any

from mergetool.checkpoint import strict_json
from mergetool.checkpoint.dtypes import BY_CODE, DType
from mergetool.checkpoint.names import quoted
from mergetool.errors import HeaderError

MAX_HEADER = 100_000_000
ALIGNMENT = 64

_U64 = 2**64 - 1
_PREFIX = 8
_METADATA = "__metadata__"
_FIELDS = ("dtype", "shape", "data_offsets")
_AGAIN = "download or save it again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: element type, shape, and its bytes ``[begin, end)``.

    Bytes count from the start of the data section.
    """

    dtype: DType
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.end - self.begin

    @property
    def row_nbytes(self) -> int:
        """Stored bytes of one row of dimension 0; of all for rank 0 and for no rows."""
        return self.nbytes // max(1, self.shape[0] if self.shape else 1)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for rank 0."""
        return prod(self.shape)


class _Object(list[tuple[str, Any]]):
    """A JSON object that is not a tensor entry, as its pairs: a dict would hide repeated names."""


@dataclass(frozen=True)
class Header:
    """The table of a safetensors file. Its constructor is the only validator: an invalid one cannot exist.

    ``tensors`` is in file order: rising offsets, without holes or overlaps, from 0 to ``data_size``.
    ``data_start`` is the absolute offset of the data section and ``file_size`` the size of the whole file.
    Raises HeaderError, naming ``source``, the tensor and both numbers.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_start: int
    file_size: int
    source: InitVar[str] = "header"

    def __post_init__(self, source: str) -> None:
        rising = all(
            (a.begin, a.end) <= (b.begin, b.end) for a, b in pairwise(self.tensors.values())
        )  # sorting 1.8 million entries costs 2 s and 300 MB, and writers sort already
        ordered = (
            dict(self.tensors) if rising else dict(sorted(self.tensors.items(), key=lambda t: (t[1].begin, t[1].end)))
        )
        described = _require_tiling(ordered, source)
        if described != self.data_size:
            raise HeaderError(_wrong_size(source, self.data_start + described, self.file_size))
        object.__setattr__(self, "tensors", MappingProxyType(ordered))
        object.__setattr__(self, "metadata", MappingProxyType(dict(self.metadata)))

    @property
    def data_size(self) -> int:
        """Bytes of the data section."""
        return self.file_size - self.data_start

    @classmethod
    def parse(cls, raw: bytes, *, file_size: int, source: str) -> Header:
        """Parse a header from ``raw``, exactly the bytes before the data section.

        These are the 8-byte length and the JSON.

        ``source`` names the file in messages. Raises HeaderError for any broken rule of the format.
        """
        length = header_length(raw, file_size=file_size, source=source)
        if len(raw) != _PREFIX + length:
            raise HeaderError(
                f'"{source}" has a header of {length} bytes by its first 8 bytes, but {len(raw) - _PREFIX} were read.'
            )
        try:
            root = strict_json.loads(raw[_PREFIX:], build=_entry_or_pairs)
        except ValueError as error:
            raise HeaderError(f'"{source}": the header has {error}; {_AGAIN}.') from None
        if type(root) is not _Object:
            raise HeaderError(f'"{source}": the header is not a JSON object of tensors; {_AGAIN}.')
        tensors, metadata = _split_root(root, source)
        return cls(tensors, metadata, _PREFIX + length, file_size, source)

    @classmethod
    def plan(
        cls, entries: Iterable[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
    ) -> Header:
        """Plan the header of a new file: offsets without holes, data at a multiple of 64.

        Wider dtypes come first, so that every tensor lies on a multiple of its element; among equals the order
        of ``entries`` stays. The same entries and metadata give the same bytes. Raises HeaderError for a name
        given twice, a shape or text the format cannot hold, and a header over 100 MB.
        """
        position = 0
        tensors: dict[str, TensorInfo] = {}
        for name, dtype, shape in sorted(entries, key=lambda entry: -entry[1].bits):
            if name in tensors or name == _METADATA:
                raise HeaderError(f"planned file: tensor {quoted(name)} is planned twice or has a reserved name.")
            size = _nbytes(TensorInfo(dtype, shape, 0, 0), name, "planned file")
            tensors[name] = TensorInfo(dtype, shape, position, position + size)
            position += size
        encoded = _encode(tensors, metadata or {})
        return cls(tensors, metadata or {}, len(encoded), len(encoded) + position, "planned file")

    def encode(self) -> bytes:
        """Encode the header as its 8-byte length and padded JSON.

        Spaces pad it to a multiple of 64 bytes.

        Metadata keys are sorted and tensors in file order. For a planned header the length is ``data_start``;
        for one that was parsed it is the canonical spelling, which may be longer or shorter than the original.
        """
        return _encode(self.tensors, self.metadata)


def header_length(prefix: bytes, *, file_size: int, source: str) -> int:
    """Read the length of a file's JSON, checked before anything is allocated.

    ``prefix`` is the first 8 bytes or more. Raises HeaderError for a file that is too short for its header and
    for a header over 100 MB.
    """
    if file_size < _PREFIX or len(prefix) < _PREFIX:
        raise HeaderError(f'"{source}" has {file_size} bytes, but a safetensors file has at least 8; {_AGAIN}.')
    length = int.from_bytes(prefix[:_PREFIX], "little")
    if length > MAX_HEADER:
        raise HeaderError(
            f'"{source}" claims a header of {length} bytes, but the limit is {MAX_HEADER}; '
            "it is damaged or not a safetensors file."
        )
    if _PREFIX + length > file_size:
        raise HeaderError(
            f'"{source}" claims a header of {length} bytes, but only {file_size - _PREFIX} follow; {_AGAIN}.'
        )
    return length


class _Malformed(ValueError):
    """The reason to refuse an entry: completes "tensor X ..."."""


def _entry_or_pairs(pairs: strict_json.Pairs) -> TensorInfo | _Object:
    """Entries are turned into TensorInfo as soon as they are read: 1.8 million of them stay under 1 GiB."""
    if len(pairs) == len(_FIELDS):
        try:
            return _read_entry(pairs)
        except _Malformed:
            return _Object(pairs)
    return _Object(pairs)


def _read_entry(pairs: strict_json.Pairs) -> TensorInfo:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _Malformed(f"has the field {quoted(strict_json.first_repeated(pairs))} twice")
    for field in _FIELDS:
        if field not in fields:
            raise _Malformed(f'has no "{field}"')
    if len(fields) > len(_FIELDS):
        unknown = next(field for field in fields if field not in _FIELDS)
        raise _Malformed(f"has the unknown field {quoted(unknown)}")
    offsets = _unsigned(fields["data_offsets"], "data_offsets")
    if len(offsets) != 2:
        raise _Malformed(f"has {len(offsets)} data_offsets, not 2")
    return TensorInfo(_dtype(fields["dtype"]), _unsigned(fields["shape"], "shape"), *offsets)


def _dtype(value: Any) -> DType:
    if type(value) is _Object and len(value) == 1 and value[0][1] is None:
        value = value[0][0]
    if type(value) is not str:
        raise _Malformed("has a dtype that is not a string")
    try:
        return BY_CODE[value]
    except KeyError:
        raise _Malformed(f"has the unknown dtype {quoted(value)}") from None


def _unsigned(value: Any, field: str) -> tuple[int, ...]:
    if type(value) is not list:
        raise _Malformed(f"has a {field} that is not an array")
    for number in value:
        if type(number) is not int or not 0 <= number <= _U64:
            shown = quoted(str(number)) if isinstance(number, int | float | str) else f"a {type(number).__name__}"
            raise _Malformed(f"has {shown} in its {field}, where only integers from 0 to 2^64-1 may stand")
    return tuple(value)


def _split_root(root: _Object, source: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    seen_metadata = False
    for name, value in root:
        if name == _METADATA:
            if seen_metadata:
                raise HeaderError(f'"{source}": the header has "{_METADATA}" twice; {_AGAIN}.')
            seen_metadata = True
            metadata = _read_metadata(value, source)
            continue
        if name in tensors:
            raise HeaderError(
                f'"{source}" lists tensor {quoted(name)} twice, so programs may read it differently; {_AGAIN}.'
            )
        tensors[name] = value if type(value) is TensorInfo else _reread(value, name, source)
    return tensors, metadata


def _reread(value: Any, name: str, source: str) -> TensorInfo:
    try:
        if type(value) is _Object:
            return _read_entry(value)
        if type(value) is list and len(value) == len(_FIELDS):
            return _read_entry(list(zip(_FIELDS, value, strict=True)))
    except _Malformed as reason:
        raise HeaderError(f'"{source}": tensor {quoted(name)} {reason}; {_AGAIN}.') from None
    raise HeaderError(f'"{source}": tensor {quoted(name)} is not described by a JSON object; {_AGAIN}.')


def _read_metadata(value: Any, source: str) -> dict[str, str]:
    if value is None:  # some writers put it where there is none, and the library reads it so
        return {}
    if type(value) is not _Object:
        raise HeaderError(f'"{source}": "{_METADATA}" is not a JSON object of strings; {_AGAIN}.')
    metadata: dict[str, str] = {}
    for key, text in value:
        if key in metadata:
            raise HeaderError(f'"{source}": the metadata has {quoted(key)} twice; {_AGAIN}.')
        if type(text) is not str:
            raise HeaderError(f'"{source}": the metadata has a value for {quoted(key)} that is no string; {_AGAIN}.')
        metadata[key] = text
    return metadata


def _nbytes(info: TensorInfo, name: str, source: str) -> int:
    """Bytes by dtype and shape; the running product is bounded, so a 0 after an overflow does not excuse it."""
    count = 1
    for size in info.shape:
        if not 0 <= size <= _U64:
            raise HeaderError(f'"{source}": tensor {quoted(name)} has the size {size} in its shape.')
        count *= size
        if count > _U64:
            break
    bits = count * info.dtype.bits
    if bits > _U64:
        raise HeaderError(
            f'"{source}": tensor {quoted(name)} has more than 2^64-1 bits by its shape {_shape(info.shape)}; {_AGAIN}.'
        )
    if bits % 8:
        raise HeaderError(
            f'"{source}": tensor {quoted(name)} is {info.dtype.code} of shape {_shape(info.shape)}, {bits} bits, '
            f"which is not a whole number of bytes; {_AGAIN}."
        )
    return bits // 8


def _require_tiling(tensors: Mapping[str, TensorInfo], source: str) -> int:
    """The end of the last tensor; every one must start where the one before it ended."""
    position = 0
    before = ""
    for name, info in tensors.items():
        if info.begin != position or info.end < info.begin:
            raise HeaderError(_misplaced(name, info, position, before, source))
        size = _nbytes(info, name, source)
        if info.end - info.begin != size:
            raise HeaderError(
                f'"{source}": tensor {quoted(name)} is {info.dtype.code} of shape {_shape(info.shape)}, {size} bytes, '
                f"but its offsets {info.begin} to {info.end} hold {info.end - info.begin}; {_AGAIN}."
            )
        position = info.end
        before = name
    return position


def _misplaced(name: str, info: TensorInfo, position: int, before: str, source: str) -> str:
    where = f'"{source}": tensor {quoted(name)}'
    if info.end < info.begin:
        return f"{where} ends at byte {info.end}, before it begins at byte {info.begin}; {_AGAIN}."
    if position == 0 and not before:
        return f"{where} is the first but begins at byte {info.begin}, not at byte 0; {_AGAIN}."
    relation = "overlaps" if info.begin < position else "leaves a hole after"
    return (
        f"{where} begins at byte {info.begin} and {relation} tensor {quoted(before)}, "
        f"which ends at byte {position}; {_AGAIN}."
    )


def _wrong_size(source: str, described: int, file_size: int) -> str:
    if file_size > described:
        return (
            f'"{source}" has {file_size - described} extra bytes at its end: its header describes {described} bytes '
            f"and the file has {file_size}; {_AGAIN}, or cut it to {described} bytes."
        )
    return f'"{source}" is cut short: its header describes {described} bytes and the file has {file_size}; {_AGAIN}.'


def _shape(shape: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, shape[:8]))
    return f"[{shown}{', …' if len(shape) > 8 else ''}]"


def _encode(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, Any] = {}
    if metadata:
        if not all(type(text) is str for pair in metadata.items() for text in pair):
            raise HeaderError("planned file: metadata holds something that is not a string.")
        table[_METADATA] = dict(sorted(metadata.items()))
    for name, info in tensors.items():
        table[name] = {"dtype": info.dtype.code, "shape": info.shape, "data_offsets": (info.begin, info.end)}
    try:
        text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError:
        raise HeaderError("planned file: a tensor name or metadata text holds half of a surrogate pair.") from None
    length = -(-(_PREFIX + len(text)) // ALIGNMENT) * ALIGNMENT - _PREFIX
    if length > MAX_HEADER:
        raise HeaderError(f"planned file: its header has {length} bytes, but the limit is {MAX_HEADER}.")
    return length.to_bytes(_PREFIX, "little") + text.ljust(length)
