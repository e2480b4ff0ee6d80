"""Stored elements as float32, and float32 as stored elements.

The compiled kernels convert them where they were built, numpy elsewhere.

An element's exponent and mantissa are put where float32 has its lowest ones, or taken from there; a multiplication by a power of two is
exact, subnormals included. numpy's own conversions of float16 take 3 to 5 ns an element, these 0.5 to 1.5 (AMD EPYC 9005, one core).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.ops.rounding import FORMATS
from mergetool.ops.stored import kind_of
from mergetool.quant import fp8
from mergetool.quant.encoding import Floats
from mergetool_kernels import compiled

Elements = npt.NDArray[np.generic]
"""Elements as they are stored: floats of 64 and 32 bits as such, smaller ones as unsigned integers of their width."""
Words = npt.NDArray[np.uint32]

STORED: Mapping[DType, np.dtype[np.generic]] = MappingProxyType(
    {
        dtypes.F64: np.dtype("<f8"),
        dtypes.F32: np.dtype("<f4"),
        dtypes.F16: np.dtype("<u2"),
        dtypes.BF16: np.dtype("<u2"),
        dtypes.F8_E4M3: np.dtype("u1"),
        dtypes.F8_E5M2: np.dtype("u1"),
    }
)
SATURATING = (dtypes.F8_E4M3, dtypes.F8_E5M2)
"""Dtypes that saturate: they have no infinity, or no useful one."""
EXPONENT = np.uint32(0x7F800000)

_BLOCK = 1 << 16  # elements that are converted at a time: two buffers of them stay in the cache
_WORTH_A_CALL = 1 << 12  # elements; a call of the compiled kernels takes 20 us, numpy's about 6 for a thousand of them
# What float32's exponent is biased by more than the dtype's, as a factor, and the code of NaN.
_REBIAS: Mapping[DType, float] = MappingProxyType(
    {dtypes.F16: 2.0**112, dtypes.F8_E4M3: 2.0**120, dtypes.F8_E5M2: 2.0**112}
)
_NAN: Mapping[DType, int] = MappingProxyType(
    {dtypes.F16: 0x7E00, dtypes.BF16: 0x7FC0, dtypes.F8_E4M3: 0x7F, dtypes.F8_E5M2: 0x7F}
)
_INFINITE: Mapping[DType, int] = MappingProxyType({dtypes.F16: 0x7C00, dtypes.BF16: 0x7F80})


def as_elements(raw: memoryview, dtype: DType) -> Elements:
    """View the stored bytes as elements, at any address.

    The view must not be written to, and ``raw`` must outlive it.
    """
    return np.frombuffer(raw, STORED[dtype])


def widen(stored: Elements, dtype: DType, out: Floats) -> None:
    """Write the values of ``stored`` into ``out``, as many float32; fp64 is rounded to them."""
    if stored.size >= _WORTH_A_CALL and _in_one_pass(stored, dtype, out, dtypes.F32):
        return
    with np.errstate(all="ignore"):
        if dtype is dtypes.BF16:
            words = out.view(np.uint32)
            np.copyto(words, stored, casting="unsafe")
            np.left_shift(words, np.uint32(16), out=words)
        elif dtype is dtypes.F16:
            _widen_half(stored, out)
        elif dtype in SATURATING:
            fp8.widen(stored.view(np.uint8), dtype, out)
        else:
            np.copyto(out, stored, casting="unsafe")


def narrow(values: Floats, dtype: DType, out: Elements) -> None:
    """Round float32 ``values`` to nearest even into ``out``.

    Those beyond the range become infinite in fp16 and bf16, the largest value in the FP8 types; NaN stays NaN.
    """
    if values.size >= _WORTH_A_CALL and _in_one_pass(values, dtypes.F32, out, dtype):
        return
    if dtype not in _NAN:
        np.copyto(out, values, casting="unsafe")
        return
    room: Floats = np.empty((2, min(_BLOCK, values.size)), np.float32)
    with np.errstate(all="ignore"):
        for at in range(0, values.size, _BLOCK):
            block, codes = values[at : at + _BLOCK], out[at : at + _BLOCK]
            words = (_brain if dtype is dtypes.BF16 else _small)(block, dtype, room[:, : block.size])
            np.copyto(codes, words, casting="unsafe")
            if np.isnan(block.max()):
                codes[np.isnan(block)] = _NAN[dtype]


def beyond(values: Floats, stored: Elements, dtype: DType) -> int:
    """Count the finite ``values`` beyond the range of the dtype that they are ``stored`` in.

    Infinite ones count in the FP8 types too.
    """
    if dtype in SATURATING:
        return int(np.count_nonzero(np.abs(values) > np.float32(dtype.largest)))
    if dtype not in _INFINITE:
        return 0
    magnitude = stored.view(np.uint16) & np.uint16(0x7FFF)
    return int(np.count_nonzero((magnitude == _INFINITE[dtype]) & ~np.isinf(values)))


def _in_one_pass(source: Elements | Floats, dtype: DType, out: Elements | Floats, into: DType) -> bool:
    """Convert by the compiled kernels; False where they are not built or an element is not ordinary."""
    kinds = kind_of(dtype), kind_of(into)
    if kinds[0] is None or kinds[1] is None:
        return False
    raw = np.ascontiguousarray(source).view(np.uint8).data
    done = compiled.blend(
        [(compiled.LOAD, 0, 0)],
        [],
        [(raw, kinds[0], 1.0)],
        source.size,
        out.view(np.uint8).data,
        kinds[1],
        saturating=into in SATURATING,
    )
    return done.is_ordinary


def _widen_half(stored: Elements, out: Floats) -> None:
    bits = out.view(np.int32)
    np.copyto(bits, stored.view(np.int16))  # the sign fills the top
    np.left_shift(bits, np.int32(13), out=bits)
    words = out.view(np.uint32)
    np.bitwise_and(words, np.uint32(0x8FFFE000), out=words)
    np.multiply(out, np.float32(_REBIAS[dtypes.F16]), out=out)
    magnitude = stored.view(np.uint16) & np.uint16(0x7FFF)
    if magnitude.size and int(magnitude.max()) >= _INFINITE[dtypes.F16]:
        infinite = magnitude == _INFINITE[dtypes.F16]
        out[infinite] = np.copysign(np.float32(np.inf), out[infinite])
        out[magnitude > _INFINITE[dtypes.F16]] = np.nan


def _brain(values: Floats, dtype: DType, room: Floats) -> Words:
    """bf16 is the upper half of a float32: half a unit less one, and the last bit that stays, carry what is to be rounded up."""
    bits: Words = values.view(np.uint32)
    words: Words = room[0].view(np.uint32)
    np.right_shift(bits, np.uint32(16), out=words)
    np.bitwise_and(words, np.uint32(1), out=words)
    np.add(words, np.uint32(0x7FFF), out=words)
    np.add(words, bits, out=words)
    np.right_shift(words, np.uint32(16), out=words)
    return words


def _small(values: Floats, dtype: DType, room: Floats) -> Words:
    """Adding 2**(23 - mantissa) times a value's own power of two leaves no room for more bits, and IEEE addition rounds."""
    shape, (size, magic) = FORMATS[dtype], room
    np.abs(values, out=size)
    np.bitwise_and(size.view(np.uint32), EXPONENT, out=magic.view(np.uint32))
    np.maximum(magic, np.float32(2.0**shape.smallest), out=magic)
    np.minimum(magic, np.float32(2.0**100), out=magic)
    np.multiply(magic, np.float32(2.0 ** (23 - shape.mantissa)), out=magic)
    np.add(size, magic, out=size)
    np.subtract(size, magic, out=size)
    # 65536 is where the bits of fp16's infinity come from.
    np.minimum(size, np.float32(dtype.largest if dtype in SATURATING else 2.0**16), out=size)
    np.multiply(size, np.float32(1 / _REBIAS[dtype]), out=size)
    words: Words = size.view(np.uint32)
    sign: Words = magic.view(np.uint32)
    np.right_shift(words, np.uint32(23 - shape.mantissa), out=words)
    np.right_shift(values.view(np.uint32), np.uint32(32 - dtype.bits), out=sign)
    np.bitwise_and(sign, np.uint32(1 << (dtype.bits - 1)), out=sign)
    np.bitwise_or(words, sign, out=words)
    return words
