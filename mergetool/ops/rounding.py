"""Round float32 to the output dtype: to nearest, stochastically, or with error feedback.

Stochastic rounding takes 32 random bits an element from a counter: they depend on the seed, the tensor's name and the
element's index alone, so the bytes are the same on any number of threads, in any chunks and on any device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Literal

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType

Mode = Literal["nearest", "stochastic", "error-feedback"]
MODES: tuple[Mode, ...] = ("nearest", "stochastic", "error-feedback")


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format: stored mantissa bits, and its smallest normal exponent.

    That is the exponent of the smallest normal number.

    The spacing of its numbers around v is ``2 ** (max(floor(log2(abs(v))), smallest) - mantissa)``.
    """

    mantissa: int
    smallest: int


FORMATS: Mapping[DType, Format] = MappingProxyType(
    {
        dtypes.F64: Format(52, -1022),
        dtypes.F32: Format(23, -126),
        dtypes.F16: Format(10, -14),
        dtypes.BF16: Format(7, -126),
        dtypes.F8_E4M3: Format(3, -6),
        dtypes.F8_E5M2: Format(2, -14),
    }
)


def holds(wide: DType, narrow: DType) -> bool:
    """True when every finite value of ``narrow`` is a value of ``wide``."""
    w, n = FORMATS[wide], FORMATS[narrow]
    return (
        n.mantissa <= w.mantissa
        and n.smallest - n.mantissa >= w.smallest - w.mantissa
        and narrow.largest <= wide.largest
    )


@dataclass(frozen=True, slots=True)
class Nearest:
    """Rounds to the nearest value, ties to even."""


@dataclass(frozen=True, slots=True)
class Stochastic:
    """Rounds at random, and is right on average.

    A value goes away from zero with the probability that the rest is of the spacing, else towards zero.

    With q = abs(v) / spacing, element i is rounded up when ``(bits(i) >> 8) * 2**-24 < q - floor(q)``. A value at or beyond
    the dtype's largest, NaN and infinity go to nearest. ``key`` is the tensor's ``stream_key``, ``first`` the index in the
    whole output tensor of the chunk's first element. The bits of element i, all modulo 2**32:

        mix(mix(i + low(key)) ^ (high(key) + (i >> 32) * 0x9E3779B9))

    where mix, "lowbias32" of Chris Wellons' hash prospector, is ``x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15;
    x *= 0x846CA68B; x ^= x >> 16``.
    """

    key: int
    first: int


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """Rounds to nearest, with the error of the row's previous element added.

    All of it is float32.

    The chunk is whole rows of ``row`` elements. Nothing is carried into a row, nor on from an element that was beyond the
    dtype's range or is not finite.
    """

    row: int


Rounding = Nearest | Stochastic | ErrorFeedback
NEAREST = Nearest()


def stream_key(seed: int, tensor: str) -> int:
    """The 64-bit key of an output tensor's random bits.

    It is made of the seed and the tensor's name in the output file.
    """
    return int.from_bytes(blake2b(f"{seed}\0{tensor}".encode(), digest_size=8).digest(), "little")
