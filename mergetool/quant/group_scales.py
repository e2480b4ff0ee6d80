"""Numbers that lie group by group of columns: a tensor [K/group, N] beside a matrix [N, K]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergetool.checkpoint.dtypes import DType
from mergetool.quant.encoding import Floats, Span, floats


def spans(tensor: str, dtype: DType, matrix: tuple[int, int], group: int, row: int, rows: int) -> list[Span]:
    """The numbers of rows ``[row, row + rows)``, a span a group.

    They lie in a tensor [K/group, N] beside a ``matrix`` [N, K].
    """
    size = dtype.itemsize
    return [Span(tensor, (i * matrix[0] + row) * size, rows * size) for i in range(matrix[1] // group)]


def stacked(raw: Sequence[memoryview], dtype: DType) -> Floats:
    """The bytes of `spans` as float32 [rows, K/group]."""
    return np.stack([floats(one, dtype) for one in raw], axis=1)
