"""The two 8-bit floats, e4m3fn and e5m2, by whole arrays. OCP 8-bit Floating Point (OFP8) 1.0 defines them.

A code's exponent and mantissa are put where float32 has its lowest ones; one multiplication by a power of two then gives the exact value,
subnormals included. 0.35 ns an element here (AMD EPYC 9005, one core, in the cache); torch's own e4m3 conversion takes 3.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from mergetool.checkpoint.dtypes import F8_E4M3, F8_E5M2, F64, DType
from mergetool.quant.encoding import Floats, Octets, floats

# Mantissa bits, and 2^(127 - bias): what a code placed in float32's low exponent bits is short of.
_MANTISSA: Mapping[DType, int] = MappingProxyType({F8_E4M3: 3, F8_E5M2: 2})
_REBIAS: Mapping[DType, float] = MappingProxyType({F8_E4M3: 2.0**120, F8_E5M2: 2.0**112})
_FIRST_SPECIAL: Mapping[DType, int] = MappingProxyType({F8_E4M3: 0x7F, F8_E5M2: 0x7C})


def widen(codes: Octets, dtype: DType, out: Floats, scale: np.float32 | Floats | None = None) -> None:
    """Write ``code * scale`` into ``out``, one float32 rounding. Without ``scale`` exactly the code's value.

    ``codes`` and ``out`` have one shape, ``scale`` broadcasts against it.
    """
    bits = out.view(np.int32)
    np.copyto(bits, codes.view(np.int8))  # the sign fills the top
    np.left_shift(bits, 23 - _MANTISSA[dtype], out=bits)
    np.bitwise_and(out.view(np.uint32), _mask(dtype), out=out.view(np.uint32))
    rebias = np.float32(_REBIAS[dtype])
    if scale is None:
        out *= rebias
    elif np.all(np.abs(scale) < 64):  # then rebias * scale is a float32, exactly, and one rounding is left
        out *= rebias * scale
    else:
        out *= rebias
        with np.errstate(over="ignore", invalid="ignore"):
            out *= scale
    if codes.size and int((codes & 0x7F).max()) >= _FIRST_SPECIAL[dtype]:
        _restore_specials(codes, dtype, out)


def widened(raw: memoryview, dtype: DType) -> Floats:
    """Stored floats of any blendable dtype as float32: exactly, but for F64, which is rounded."""
    if dtype in _MANTISSA:
        codes = np.frombuffer(raw, np.uint8)
        out = np.empty(codes.shape, np.float32)
        widen(codes, dtype, out)
        return out
    return np.frombuffer(raw, "<f8").astype(np.float32) if dtype is F64 else floats(raw, dtype)


def spacing(codes: Octets, dtype: DType, scale: Floats | np.float32) -> Floats:
    """The distance between neighbouring codes at each code, times ``scale``."""
    mantissa = _MANTISSA[dtype]
    powers = np.maximum(codes & np.uint8(0x7F - (1 << mantissa) + 1), np.uint8(1 << mantissa))
    out = np.empty(codes.shape, np.float32)
    widen(powers, dtype, out)
    with np.errstate(over="ignore", invalid="ignore"):
        out *= np.float32(2.0**-mantissa) * scale
    return out


def _mask(dtype: DType) -> np.uint32:
    mantissa = _MANTISSA[dtype]
    return np.uint32(0x80000000 | (0x7F << (23 - mantissa)))


def _restore_specials(codes: Octets, dtype: DType, out: Floats) -> None:
    magnitude = codes & 0x7F
    if dtype is F8_E5M2:
        out[magnitude == 0x7C] = np.where(codes[magnitude == 0x7C] & 0x80, np.float32("-inf"), np.float32("inf"))
    out[magnitude > (0x7C if dtype is F8_E5M2 else 0x7E)] = np.nan


def narrow(values: Floats, dtype: DType) -> Octets:
    """The codes nearest to ``values``, ties to even; NaN stays NaN.

    Values beyond the range become the largest finite one.
    """
    rounded = round_to_bits(values, mantissa=_MANTISSA[dtype], lowest=-6 if dtype is F8_E4M3 else -14)
    limit = np.float32(dtype.largest)
    np.clip(rounded, -limit, limit, out=rounded)
    bits = (rounded * np.float32(1 / _REBIAS[dtype])).view(np.uint32)
    codes = ((bits >> (23 - _MANTISSA[dtype])) & 0x7F | (bits >> 24) & 0x80).astype(np.uint8)
    codes[np.isnan(values)] |= 0x7F
    return codes


def round_to_bits(values: Floats, *, mantissa: int, lowest: int) -> Floats:
    """Round ``values``, ties to even, to ``mantissa`` bits after the leading one.

    Below 2**lowest they go to whole steps of it.

    Adding 2**(23 - mantissa) times a value's own power of two leaves no room for more bits than that, and IEEE addition rounds.
    """
    size = np.abs(values)
    power = (size.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        magic = np.clip(power, np.float32(2.0**lowest), np.float32(2.0**100)) * np.float32(2.0 ** (23 - mantissa))
        size += magic
        size -= magic
    return np.copysign(size, values)
