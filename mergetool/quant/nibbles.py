"""Codes of 4 bits, two in a byte: values of both from one table of bytes.

A byte's two float32 values are moved as one item of 8 bytes: 0.4 ns an element.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mergetool.quant.encoding import Floats, Octets

_BYTES = np.arange(256)

BytePairs = npt.NDArray[np.float64]
"""The two float32 values of every byte, in column order, as one item."""


def pairs(values: Sequence[float] | Floats, *, high_first: bool = False) -> BytePairs:
    """The table of 16 values for the codes 0 to 15. The even column is in a byte's low nibble, or with ``high_first`` in its high one."""
    table = np.asarray(values, np.float32)
    low, high = table[_BYTES & 15], table[_BYTES >> 4]
    return np.stack([high, low] if high_first else [low, high], axis=1).view(np.float64).ravel()


def take(table: BytePairs, packed: Octets, out: Floats) -> None:
    """Write the values of packed codes [rows, columns / 2] into ``out`` [rows, columns]."""
    np.take(table, packed, out=out.view(np.float64), mode="clip")


PLAIN: BytePairs = pairs(range(16))
"""The code itself, low nibble first."""

SIGNED: BytePairs = pairs([*range(8), *range(-8, 0)])
"""Two's complement, -8 to 7, low nibble first."""

OFFSET: BytePairs = pairs(range(-8, 8))
"""A code less 8, low nibble first."""
