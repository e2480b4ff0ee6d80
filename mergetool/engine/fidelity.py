"""The distance of stored values from computed ones, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.quant.encoding import Floats, floats
from mergetool.quant.fp8 import widen


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Sums over elements in float64: ``energy`` of squared values, ``error`` of squared changes.

    ``worst`` is the largest change of one element.
    """

    energy: float = 0.0
    error: float = 0.0
    worst: float = 0.0

    @property
    def relative(self) -> float:
        """The Frobenius norm of the change over that of the values; 0 without a change."""
        if not self.error:
            return 0.0
        return math.sqrt(self.error / self.energy) if self.energy else math.inf

    @property
    def snr_db(self) -> float:
        """Signal over noise in decibels; infinite where nothing changed."""
        return (
            -20 * math.log10(self.relative)
            if 0 < self.relative < math.inf
            else math.inf
            if not self.error
            else -math.inf
        )

    @classmethod
    def of(cls, values: Floats, stored: Floats) -> Fidelity:
        """Compare ``values`` with the values read back, of one shape.

        NaN and infinities that were kept count for nothing.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            change = np.nan_to_num(stored.reshape(-1) - values.reshape(-1), nan=0, posinf=0, neginf=0)
        signal = np.nan_to_num(values.reshape(-1), nan=0, posinf=0, neginf=0)
        return cls(_energy(signal), _energy(change), float(np.abs(change).max(initial=0)))

    @classmethod
    def total(cls, parts: Iterable[Fidelity]) -> Fidelity:
        """Add the figures of several parts, in any order."""
        figures = list(parts)
        return cls(
            math.fsum(part.energy for part in figures),
            math.fsum(part.error for part in figures),
            max((part.worst for part in figures), default=0.0),
        )


def read_back(raw: memoryview, dtype: DType) -> Floats | None:
    """Stored plain floats as float32; None for fp64, which float32 does not hold."""
    if dtype in (dtypes.F8_E4M3, dtypes.F8_E5M2):
        codes = np.frombuffer(raw, np.uint8)
        out = np.empty(codes.shape, np.float32)
        widen(codes, dtype, out)
        return out
    return None if dtype is dtypes.F64 else floats(raw, dtype)


def _energy(values: Floats) -> float:
    return float(np.einsum("i,i->", values, values, dtype=np.float64))
