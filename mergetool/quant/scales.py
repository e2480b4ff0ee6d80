"""Check the values of scales: refuse those that are no numbers, note those of 0.

A scale of 0 makes nothing of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError
from mergetool.quant.encoding import Encoding, floats

LARGEST_READ = 1 << 20
"""Bytes of a scale tensor to check when a file is opened. Longer ones, of small blocks, show when they are decoded."""


def notes(encodings: Iterable[Encoding], read: Callable[[str, int, int], bytes], source: str) -> tuple[str, ...]:
    """Note oddities of the plain-float scales of quantised weights. The words follow the file's name.

    Raises DataError for a scale of NaN or infinity, and for one that can only be the inverse of the factor.
    """
    zero: list[str] = []
    negative: list[str] = []
    for encoding in encodings:
        for name, dtype, count in encoding.float_scales:
            size = min(count * dtype.itemsize, LARGEST_READ // dtype.itemsize * dtype.itemsize)
            values = floats(memoryview(read(name, 0, size)), dtype)
            if not np.isfinite(values).all():
                raise DataError(
                    f'"{source}": the scale {quoted(name)} is NaN or infinite, so {quoted(encoding.tensor)} has no values; '
                    "download the file again, or use the unquantised original."
                )
            if name.endswith(".scale") and values.max(initial=0) > LARGEST_AMBIGUOUS:
                raise DataError(
                    f'"{source}": the scale {quoted(name)} is {values.max():.4g}, which looks like the inverse of a factor, and '
                    'no "scale_reciprocal" lies beside it; use the unquantised original.'
                )
            if not values.all():
                zero.append(encoding.tensor)
            if (values < 0).any():
                negative.append(encoding.tensor)
    return (
        *_note(zero, "with a scale of 0, which makes them 0 in whole or in part"),
        *_note(negative, "with a scale below 0, which turns their signs"),
    )


LARGEST_AMBIGUOUS = 16.0
"""Largest value that a "scale" without its inverse is believed to be a factor: codes go to 448, weights hardly beyond 100."""


def _note(tensors: list[str], what: str) -> tuple[str, ...]:
    if not tensors:
        return ()
    weights = "1 weight" if len(tensors) == 1 else f"{len(tensors)} weights"
    return (f"has {weights} {what}: {quoted(min(tensors))}{' and others' if len(tensors) > 1 else ''}",)
