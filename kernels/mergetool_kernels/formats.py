"""Stored floats to float32 and back, inside a kernel, bit for bit as torch does on the CPU.

A kernel names a stored type by the constant in ``KIND``. ``decode`` is exact. ``encode`` rounds to nearest, ties to
even, or at random (see `uniform_bits`); FP8 saturates at its largest finite value, NaN becomes torch's NaN.

``NATIVE`` picks the GPU's conversion instructions; without it the same results come from integer arithmetic, which is
what Triton's interpreter gets right (its own casts truncate) and what GPUs before Ada need for FP8.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

F32 = tl.constexpr(0)
F16 = tl.constexpr(1)
BF16 = tl.constexpr(2)
E4M3 = tl.constexpr(3)
E5M2 = tl.constexpr(4)
F64 = tl.constexpr(5)

KIND = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
    torch.float64: 5,
}
"""The constant of each torch dtype; float64 can be read but not written."""

NEAREST = tl.constexpr(0)
STOCHASTIC = tl.constexpr(1)

# What a kernel's pointer to each stored type points at: bit patterns where the kernel handles bits itself.
_CARRIER = {
    torch.float32: torch.float32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float64: torch.float64,
}


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as the kernels take it: bit patterns for the types narrower than float32."""
    return tensor.view(_CARRIER[tensor.dtype])


@triton.jit
def decode(raw, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Float32 of stored bits (or of float32 and float64 values as they are)."""
    if KIND == F32:
        value = raw
    elif KIND == F64:
        value = raw.to(tl.float32)
    elif KIND == F16:
        value = raw.to(tl.float16, bitcast=True).to(tl.float32)
    elif KIND == BF16:
        value = (raw.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif KIND == E5M2:
        # e5m2 is the upper byte of an fp16.
        value = (raw.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif NATIVE:
        value = raw.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        code = raw.to(tl.uint32)
        # Exponent and mantissa moved into float32's fields; the factor is the difference of the two biases, 127 - 7.
        size = ((code & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        bits = size.to(tl.uint32, bitcast=True)
        bits = tl.where((code & 0x7F) == 0x7F, 0x7FC00000, bits) | ((code & 0x80) << 24)
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def mix(x):
    """A bijection of 32-bit words that leaves no visible pattern ("lowbias32", C. Wellons, 2018)."""
    x = x ^ (x >> 16)
    x = x * tl.full([], 0x7FEB352D, tl.uint32)
    x = x ^ (x >> 15)
    x = x * tl.full([], 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def uniform_bits(index, key0, key1):
    """32 random bits for each int64 element index, by the index and a key alone. The key comes in two 32-bit halves."""
    low = index.to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    k0 = key0.to(tl.uint32)
    k1 = key1.to(tl.uint32)
    return mix(mix(low + k0) ^ (k1 + high * tl.full([], 0x9E3779B9, tl.uint32)))


@triton.jit
def largest(KIND: tl.constexpr):
    """The largest finite value of a stored type."""
    if KIND == F16:
        return 65504.0
    elif KIND == BF16:
        return 3.3895313892515355e38
    elif KIND == E4M3:
        return 448.0
    elif KIND == E5M2:
        return 57344.0
    else:
        return 3.4028234663852886e38


@triton.jit
def spacing(value, KIND: tl.constexpr, SHIFT: tl.constexpr):
    """The distance between neighbours of the stored type at |value|, times 2^SHIFT.

    Among its subnormals it is theirs.
    """
    if KIND == E4M3:
        least = 2.0**-6
        scale = 2.0 ** (SHIFT - 3)
    elif KIND == E5M2:
        least = 2.0**-14
        scale = 2.0 ** (SHIFT - 2)
    elif KIND == F16:
        least = 2.0**-14
        scale = 2.0 ** (SHIFT - 10)
    elif KIND == BF16:
        least = 2.0**-126
        scale = 2.0 ** (SHIFT - 7)
    else:
        least = 2.0**-126
        scale = 2.0 ** (SHIFT - 23)
    power = (value.to(tl.uint32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power, least) * scale


@triton.jit
def _stochastic(value, random, KIND: tl.constexpr):
    """``value`` moved to a neighbour in the stored type, away from zero with the probability of its fraction, to 2^-24."""
    size = tl.abs(value)
    inside = size < largest(KIND)
    bits = value.to(tl.uint32, bitcast=True)
    if KIND == BF16:
        # The same choice on the bits: those that are cut off, plus random ones, carry over or not.
        moved = ((bits + (0xFFFF - (random >> 16))) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        ulp = spacing(size, KIND, 0)
        inverse = (0x7F000000 - ulp.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)  # 1 / ulp, a power of two
        steps = size * inverse
        below = tl.floor(steps)
        threshold = (random >> 8).to(tl.float32) * 5.9604644775390625e-08
        chosen = (below + tl.where(threshold < steps - below, 1.0, 0.0)) * ulp
        moved = (chosen.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)
    return tl.where(inside, moved, value)


@triton.jit
def _fp8(value, KIND: tl.constexpr):
    """Bits of float32 rounded to FP8, to nearest even, saturating."""
    sign = (value.to(tl.uint32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.abs(value), largest(KIND))
    bits = size.to(tl.uint32, bitcast=True)
    if KIND == E4M3:
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        # Adding a number whose own spacing is that of e4m3's subnormals rounds to it.
        tiny = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(size < 0.015625, tiny, normal)
        code = tl.where(value != value, 0x7F, code)
    else:
        normal = ((bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - 448
        tiny = (size + 128.0).to(tl.uint32, bitcast=True) - 0x43000000
        code = tl.where(size < 6.103515625e-05, tiny, normal)
        code = tl.where(value != value, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def encode(value, random, KIND: tl.constexpr, ROUNDING: tl.constexpr, NATIVE: tl.constexpr):
    """The stored bits of float32 values; only STOCHASTIC rounding uses ``random``."""
    if ROUNDING == STOCHASTIC and KIND != F32:
        value = _stochastic(value, random, KIND)
    if KIND == F32:
        stored = value
    elif KIND == F16:
        stored = value.to(tl.float16).to(tl.int16, bitcast=True)
    elif KIND == BF16:
        if NATIVE:
            rounded = value.to(tl.bfloat16).to(tl.int16, bitcast=True)
        else:
            bits = value.to(tl.uint32, bitcast=True)
            rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).to(tl.uint16).to(tl.int16, bitcast=True)
        stored = tl.where(value != value, 0x7FC0, rounded).to(tl.int16)
    elif NATIVE:
        # One instruction, which saturates; a NaN comes out without its sign.
        if KIND == E4M3:
            rounded = value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        else:
            rounded = value.to(tl.float8e5).to(tl.uint8, bitcast=True)
        sign = (value.to(tl.uint32, bitcast=True) >> 24).to(tl.uint8)
        stored = (rounded & 0x7F) | (sign & 0x80)
    else:
        stored = _fp8(value, KIND)
    return stored
