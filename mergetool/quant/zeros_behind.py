"""Read a weight's rows with zeros behind them, as a weight with more inputs has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.checkpoint.dtypes import DType
from mergetool.quant.encoding import Encoding, Floats, Span
from mergetool.quant.fp8 import widened


@dataclass(frozen=True)
class ZerosBehind(Encoding):
    """A weight's rows, each of its ``own`` elements of ``dtype`` with zeros behind.

    ``inner`` decodes the own elements where they are quantised.
    """

    own: int
    dtype: DType
    inner: Encoding | None = None

    @classmethod
    def of(cls, tensor: str, rows: int, own: int, width: int, dtype: DType, inner: Encoding | None) -> ZerosBehind:
        """The rows of the stored ``tensor``, of ``own`` elements each, as rows of ``width``."""
        shape = (rows, width)
        return cls(tensor, () if inner is None else inner.beside, shape, shape, None, own, dtype, inner)

    @property
    def label(self) -> str:
        """The dtype or container of the own elements, for people."""
        return self.dtype.name if self.inner is None else self.inner.label

    @property
    def tile_rows(self) -> int:
        """The tile of the own elements."""
        return 1 if self.inner is None else self.inner.tile_rows

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """None: nothing is rounded to such rows."""
        return np.zeros((rows, 1), np.float32)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        if self.inner is not None:
            return self.inner.spans(row, rows)
        size = self.own * self.dtype.itemsize
        return (Span(self.tensor, row * size, rows * size),)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        out[:, self.own :] = 0
        if self.inner is None:
            out[:, : self.own] = widened(raw[0], self.dtype).reshape(rows, self.own)
            return
        values = np.empty((rows, self.own), np.float32)
        self.inner.decode(raw, row, rows, values)
        out[:, : self.own] = values
