"""Sums over models side by side, for a comparison: compiled where possible, else numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergetool.checkpoint.dtypes import F32, DType
from mergetool.ops.stored import Stored, kind_of
from mergetool.quant.encoding import Floats
from mergetool_kernels import compiled

RUN = 4096
"""Products that numpy adds up in float32; further sums are in float64, so a sum is within 1e-6 of its float64 value. Shorter runs pay
for calls: 0.16 ns an element of 1024, 0.08 of 4096 (AMD EPYC 9004)."""

_SAFE = 1e-30, 1e30  # outside, squares of float32 may have vanished or overflowed


def is_read(stored: Stored) -> bool:
    """Whether `side_by_side` takes elements as they are stored. Others must be made float32 before."""
    return (stored.dtype is F32 and stored.factor == 1) or kind_of(stored.dtype) is not None


def side_by_side(models: Sequence[Stored | None], count: int) -> list[float]:
    """Six sums over ``count`` elements of up to five models.

    The models are base, variant, what the delta is added to, a reference and its base; the last three may be None.

    They are: of the squares of base, variant, delta = variant - base, of what it is added to, of the reference delta, and of delta * reference
    delta; 0 where there is no such model. Deltas are in float32. A sum is not finite only when an element, or a delta, is not.
    """
    if compiled.is_available():
        return compiled.sums([None if m is None else (m.raw, _kind(m.dtype), m.factor) for m in models], count)
    return with_numpy([None if model is None else np.frombuffer(model.raw, np.float32, count) for model in models])


def _kind(dtype: DType) -> int:
    kind = kind_of(dtype)
    if kind is None:
        raise ValueError(f"{dtype.code} is not summed as it is stored")
    return kind


def with_numpy(models: Sequence[Floats | None]) -> list[float]:
    """The same of float32 vectors, without the compiled kernel."""
    base, variant, onto, reference, reference_base = models
    assert base is not None
    assert variant is not None
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite the caller refuses by name
        delta = variant - base
        sums = [square(base), square(variant), square(delta), 0.0 if onto is None else square(onto), 0.0, 0.0]
        if reference is not None and reference_base is not None:
            other = reference - reference_base
            sums[4] = square(other)
            is_safe = all(_SAFE[0] < sums[i] < _SAFE[1] for i in (2, 4))
            sums[5] = (_dot if is_safe else _wide_dot)(delta, other)
    return sums


def square(values: Floats) -> float:
    """The sum of the squares of a vector; not finite when one of its elements is not."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = _dot(values, values)
    if _SAFE[0] < total < _SAFE[1] or (total == 0 and not values.any()):
        return total
    return _wide_dot(values, values)


def _dot(a: Floats, b: Floats) -> float:
    whole = len(a) // RUN * RUN
    runs = np.vecdot(a[:whole].reshape(-1, RUN), b[:whole].reshape(-1, RUN))
    return float(runs.sum(dtype=np.float64)) + float(np.vecdot(a[whole:], b[whole:]))


def _wide_dot(a: Floats, b: Floats) -> float:
    return float(a.astype(np.float64) @ b.astype(np.float64))
