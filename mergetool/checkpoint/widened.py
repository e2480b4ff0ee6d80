"""A checkpoint with more columns of some matrices, filled with zeros.

A control LoRA needs such a model: it reads a second picture beside the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint


class WidenedCheckpoint(Checkpoint):
    """The checkpoint ``narrow`` with other ``widths`` of some tensors, by stored name.

    Those tensors are kept in memory. The columns behind a tensor's own are zeros. Everything else, and the fingerprint, is that of ``narrow``.
    """

    def __init__(self, narrow: Checkpoint, widths: Mapping[str, int]) -> None:
        self._narrow = narrow
        self.source, self.files, self.metadata = narrow.source, narrow.files, narrow.metadata
        self.config, self.container, self.packed, self.memory = (
            narrow.config,
            narrow.container,
            narrow.packed,
            narrow.memory,
        )
        wide = {name: _widened(narrow, name, width) for name, width in widths.items()}
        self.tensors = MappingProxyType({**narrow.tensors, **{name: info for name, (info, _) in wide.items()}})
        self._places = {**narrow._places, **{name: (held, 0) for name, (_, held) in wide.items()}}

    def fingerprint(self) -> str:
        """The fingerprint of the model in its files."""
        return self._narrow.fingerprint()

    def close(self) -> None:
        """Close every file. Idempotent."""
        self._narrow.close()


class _Bytes:
    """Bytes in memory; see `checkpoint.inputs.Readable`."""

    def __init__(self, name: str, held: bytes) -> None:
        self.size = len(held)
        self._name, self._held = name, memoryview(held)

    def window(self, offset: int, size: int) -> memoryview:
        """A view of ``size`` bytes at ``offset``. Raises ValueError past the end."""
        if offset < 0 or offset + size > self.size:
            raise ValueError(f"{quoted(self._name)} has {self.size} bytes; {offset} to {offset + size} are not in it")
        return self._held[offset : offset + size]

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``."""
        view = buffer.cast("B")
        view[:] = self.window(offset, len(view))

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``."""
        return bytes(self.window(offset, size))

    def release(self, offset: int, size: int) -> None:
        """Nothing: the bytes stay."""

    def will_need(self, offset: int, size: int) -> None:
        """Nothing: the bytes are there."""

    def forget(self, offset: int, size: int) -> None:
        """Nothing, as `release`."""


def _widened(narrow: Checkpoint, name: str, width: int) -> tuple[TensorInfo, _Bytes]:
    """A matrix of any plain dtype with ``width`` columns; zero has no bit set in any of them."""
    info = narrow.tensors[name]
    rows, columns = info.shape
    old, new = info.row_nbytes, info.row_nbytes // columns * width
    raw, held = narrow.read(name), bytearray(rows * new)
    for row in range(rows):
        held[row * new : row * new + old] = raw[row * old : (row + 1) * old]
    return TensorInfo(info.dtype, (rows, width), 0, len(held)), _Bytes(name, bytes(held))
