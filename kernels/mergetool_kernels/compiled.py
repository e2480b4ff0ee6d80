"""Kernels for the processor, compiled from C when the package is installed; imports neither torch nor triton.

sums([(raw, BFLOAT16), (other, BFLOAT16)], count)     [of base, of variant, of their delta, 0.0, 0.0, 0.0]
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

LIBRARY = Path(__file__).with_name("sums.so")
FLOAT32, BFLOAT16 = 0, 1
_WIDTHS = {FLOAT32: 4, BFLOAT16: 2}
_MODELS, _SUMS = 5, 6

Stored = tuple[memoryview, int]
"""Elements as they are stored, at any address, and `FLOAT32` or `BFLOAT16`."""


def is_available() -> bool:
    """Whether the library was built for this machine."""
    return _library() is not None


def sums(models: Sequence[Stored | None], count: int) -> list[float]:
    """Six sums over ``count`` elements, of base, variant, and if there are any what the delta is added to, and a reference with its base.

    They are: of the squares of base, variant, delta = variant - base, of what it is added to, of the reference delta, and of delta *
    reference delta. Deltas are float32; products are added up in float32 by runs of 1024, and those, like runs whose squares leave float32,
    in float64. The same on every processor. A sum is not finite only when an element, or a difference in float32, is not. The interpreter's
    lock is free meanwhile. Raises ValueError for too few bytes, RuntimeError where `is_available` is False.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the compiled kernels are not built; install mergetool where there is a C compiler")
    addresses, kinds = (ctypes.c_void_p * _MODELS)(), (ctypes.c_int * _MODELS)()
    for place, model in enumerate(models):
        if model is not None:
            raw, kind = model
            if raw.nbytes < count * _WIDTHS[kind]:
                raise ValueError(f"model {place} has {raw.nbytes} bytes, and {count} elements of it were asked for")
            addresses[place] = np.frombuffer(raw, np.uint8).ctypes.data if count else None
            kinds[place] = kind
    found = (ctypes.c_double * _SUMS)()
    library.mergetool_sums(addresses, kinds, count, found)
    return list(found)


@cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError:
        return None
    library.mergetool_sums.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.mergetool_sums.restype = None
    return library
