"""What the fused kernel does, said in torch: for torch eager and torch.compile to do the same work.

Everything is of ``a + m * (b - c)`` in float32, rounded once to the dtype of ``a``; FP8 inputs have a scale each, the output an inverse
one. torch.compile contracts multiplications with additions, so now and then its last bit is another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Figures = tuple[Tensor, ...]
"""Non-finite and beyond; then, where they are counted, moved, eaten and below half a unit, delta's energy and its projection."""

_LEAST_NORMAL = {torch.bfloat16: 2.0**-126, torch.float8_e4m3fn: 2.0**-6}
_FRACTION_BITS = {torch.bfloat16: 7, torch.float8_e4m3fn: 3}
_BEYOND = {torch.bfloat16: float("inf"), torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Bridge:
    """Three stored models of n elements, one dtype, and what they are scaled by: [1] float32 each, or None."""

    a: Tensor
    b: Tensor
    c: Tensor
    multiplier: float
    scales: tuple[Tensor, Tensor, Tensor] | None = None
    inverse: Tensor | None = None

    def plain(self) -> Tensor:
        """Stored elements."""
        return self._rounded(self._scaled(self._value()))

    def checked(self) -> tuple[Tensor, Figures]:
        """And how many elements are not finite, and how many too large for the dtype."""
        value = self._value()
        scaled = self._scaled(value)
        stored = self._rounded(scaled)
        return stored, self._faults(value, scaled, stored)

    def counted(self) -> tuple[Tensor, Figures]:
        """And what rounding let through of what was added to ``a``."""
        value = self._value()
        scaled = self._scaled(value)
        stored = self._rounded(scaled)
        return stored, self._faults(value, scaled, stored) + self._movement(value, stored)

    def stochastic(self) -> Tensor:
        """Stored elements, BF16 only, rounded up with the probability of what would be cut."""
        value = self._value()
        bits = value.view(torch.int32) + torch.randint_like(value, 0, 1 << 16, dtype=torch.int32)
        return torch.where(value.isfinite(), (bits & -65536).view(torch.float32), value).to(self.a.dtype)

    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.scales is None:
            return self.a.float(), self.b.float(), self.c.float()
        one, two, three = self.scales
        return self.a.float() * one, self.b.float() * two, self.c.float() * three

    def _value(self) -> Tensor:
        a, b, c = self._values()
        return a + self.multiplier * (b - c)

    def _scaled(self, value: Tensor) -> Tensor:
        return value if self.inverse is None else value * self.inverse

    def _rounded(self, scaled: Tensor) -> Tensor:
        if self.a.dtype == torch.float8_e4m3fn:
            scaled = scaled.clamp(-448, 448)
        return scaled.to(self.a.dtype)

    def _faults(self, value: Tensor, scaled: Tensor, stored: Tensor) -> Figures:
        finite = value.isfinite()
        largest = _BEYOND[self.a.dtype]
        beyond = finite & (_back(stored).abs() == largest) if largest == float("inf") else scaled.abs() > largest
        return (~finite).sum(), beyond.sum()

    def _movement(self, value: Tensor, stored: Tensor) -> Figures:
        base = self._values()[0]
        plain = self._scaled(base)
        came, untouched = _back(stored), _back(self._rounded(plain))
        change = came - untouched
        known = value.isfinite() & change.isfinite()
        delta = torch.where(known, value - base, 0.0)
        change = torch.where(known, change, 0.0)
        size = delta.abs()
        if self.inverse is not None:
            size, change = size * self.inverse, change / self.inverse
        moved = delta != 0
        power = (plain.view(torch.int32) & 0x7F800000).view(torch.float32)
        half = power.clamp(min=_LEAST_NORMAL[self.a.dtype]) * 2.0 ** (-1 - _FRACTION_BITS[self.a.dtype])
        return (
            moved.sum(),
            (moved & (came == untouched)).sum(),
            (moved & (size < half)).sum(),
            (delta * delta).sum(),
            (delta * change).sum(),
        )


def compiled(work: Callable[[], object]) -> Callable[[], object]:
    """``work`` by torch.compile, compiled and run once."""
    found: Callable[[], object] = torch.compile(work)
    found()
    return found


def _back(stored: Tensor) -> Tensor:
    """Stored values as float32, by way of their bits: torch.compile would take a cast and the cast back for nothing at all."""
    if stored.dtype == torch.bfloat16:
        return (stored.view(torch.int16).to(torch.int32) << 16).view(torch.float32)
    return stored.view(torch.uint8).view(stored.dtype).float()
