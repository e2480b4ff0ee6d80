"""GGUF blocks, dequantised by the ``gguf`` package. It knows Q8_0, the K-quants, Q4_0 and more.

Blocks run along rows, so any rows of a tensor can be read alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from mergetool.checkpoint.gguf import BlockType, Packed
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError
from mergetool.quant.encoding import Encoding, Floats, Span


@dataclass(frozen=True)
class GgufBlocks(Encoding):
    """A tensor of ggml blocks; more than two dimensions count as rows of the last one."""

    kind: BlockType

    @property
    def label(self) -> str:
        """The block type."""
        return f"GGUF {self.kind.name}"

    @property
    def rows(self) -> int:
        """Rows of whole blocks."""
        return self.padded[0]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return self.padded[1]

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        size = self._row_nbytes
        return (Span(self.tensor, row * size, rows * size),)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        import gguf

        blocks = np.frombuffer(raw[0], np.uint8).reshape(rows, self._row_nbytes)
        with np.errstate(over="ignore", invalid="ignore"):
            out[:] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[self.kind.name]).reshape(rows, -1)

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The range of 32 values over the steps that the type's bits allow. That is about its scale."""
        out = np.empty((rows, self.padded[1]), np.float32)
        self._decode(raw, row, rows, out)
        blocks = out.reshape(rows, -1, min(32, self.kind.block))
        bits = int(next(letter for letter in self.kind.name + "4" if letter.isdigit()))
        step = (blocks.max(axis=2) - blocks.min(axis=2)) / np.float32(2**bits - 1)
        return np.repeat(step, blocks.shape[2], axis=1)

    @property
    def _row_nbytes(self) -> int:
        return self.padded[1] // self.kind.block * self.kind.nbytes


def encoding_of(tensor: str, packed: Packed, source: str) -> GgufBlocks:
    """The tensor as blocks. Raises DataError where the ``gguf`` package does not dequantise the type."""
    import gguf

    try:
        one = np.zeros((1, packed.kind.nbytes), np.uint8)
        gguf.quants.dequantize(one, gguf.GGMLQuantizationType[packed.kind.name])
    except (NotImplementedError, KeyError):
        raise DataError(
            f'"{source}": tensor {quoted(tensor)} is of GGUF type {packed.kind.name}, which the gguf package cannot '
            "dequantise; use a file of another type (Q8_0, Q6_K, Q5_K, Q4_K), or the unquantised original."
        ) from None
    rows = prod(packed.shape) // max(1, packed.width)
    return GgufBlocks(tensor, (), packed.shape, (rows, packed.width), None, packed.kind)
