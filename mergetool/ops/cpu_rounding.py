"""Rounding on the CPU: float32 to an output dtype in the ways that ``ops.rounding`` defines.

Everything runs in place on buffers that stay in the cache; 0.1 ns an element a pass here (AMD EPYC 9004). Stochastic rounding is about 20
passes, most of them for the bits.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.ops.conversion import EXPONENT, SATURATING, STORED, Elements, Words, beyond, narrow, widen
from mergetool.ops.rounding import FORMATS, ErrorFeedback, Stochastic
from mergetool.quant.encoding import Floats

BLOCK = 1 << 18  # elements that are worked on at a time: 1 MB a buffer; smaller ones pay for calls

_WORD = 1 << 32
_COUNT = np.arange(BLOCK, dtype=np.uint32)
# One column loop at a time: its operations are so short that two of them spend their time handing over the GIL.
# 1024 rows, 2 threads: 21 ns an element, one after the other 8.
_ONE_LOOP = threading.Lock()


class Scratch:
    """Five vectors of ``BLOCK`` elements, and two of truth values.

    The five are float32 and uint32 at once, which share memory.
    """

    def __init__(self) -> None:
        self.floats: Floats = np.empty((5, BLOCK), np.float32)
        self.words: Words = self.floats.view(np.uint32)
        self.masks = np.empty((2, BLOCK), np.bool_)


def nearest(values: Floats, stored: Elements, dtype: DType, *, safe: bool = False) -> int:
    """Round float32 ``values`` to nearest even into ``stored``. Returns how many were beyond the range.

    ``safe`` says that none is near its end, which saves a look at each.
    """
    narrow(values, dtype, stored)
    return 0 if safe or _is_within(values, dtype.largest) else beyond(values, stored, dtype)


def stochastic(
    values: Floats, stored: Elements, dtype: DType, rounding: Stochastic, scratch: Scratch, *, safe: bool = False
) -> int:
    """Round float32 ``values`` stochastically into ``stored``. Returns how many were beyond the range.

    ``safe`` says that none is near its end, which saves a look at each.
    """
    count, at = values.size, 0
    while at < count:
        index = rounding.first + at
        stop = min(count, at + BLOCK, at + _WORD - index % _WORD)
        block, target = values[at:stop], stored[at:stop]
        random_bits(rounding.key, index, scratch.words[0, : stop - at], scratch.words[1, : stop - at])
        if dtype is dtypes.BF16:
            _stochastic_bf16(block, target, scratch)
        else:
            _stochastic_any(block, target, dtype, scratch)
        at = stop
    if safe:
        return 0
    with np.errstate(all="ignore"):
        outside = ~(np.abs(values) < np.float32(dtype.largest))
    if bool(outside.any()):
        to_nearest = np.empty(int(np.count_nonzero(outside)), stored.dtype)
        narrow(values[outside], dtype, to_nearest)
        stored[outside] = to_nearest
    return beyond(values, stored, dtype)


def error_feedback(values: Floats, stored: Elements, dtype: DType, rounding: ErrorFeedback) -> int:
    """Round float32 ``values``, in whole rows, with error feedback into ``stored``.

    Returns how many were beyond the range.

    Rows are independent, so a column of all rows is rounded at a time. Needs ``4 + itemsize`` bytes an element while it runs.
    """
    with _ONE_LOOP, np.errstate(all="ignore"):
        sums: Floats = values.reshape(-1, rounding.row).T.copy()
        # What is carried is at most half a spacing, so that below half the largest value nothing can go out of range.
        safe = _is_within(values, min(dtype.largest / 2, 2.0**100))
        (_feed_back if safe else _feed_back_within)(sums, dtype)
        columns: Elements = np.empty(sums.size, STORED[dtype])
        narrow(sums.reshape(-1), dtype, columns)
        stored.reshape(-1, rounding.row)[...] = columns.reshape(sums.shape).T
        return 0 if safe else beyond(sums.reshape(-1), columns, dtype)


def _feed_back(sums: Floats, dtype: DType) -> None:
    """Round each row of ``sums`` with the error of the one before, in place.

    Adding 1.5 * 2**(23 - mantissa) times a value's own power of two leaves no room for more bits, of either sign, and IEEE addition rounds.
    9 short operations, 5 us a row of 1092 (AMD EPYC 9005).
    """
    shape = FORMATS[dtype]
    least, step = np.float32(2.0**shape.smallest), np.float32(1.5 * 2.0 ** (23 - shape.mantissa))
    carry, magic = np.zeros((2, sums.shape[1]), np.float32)
    for total in sums:
        np.add(total, carry, out=total)
        np.bitwise_and(total.view(np.uint32), EXPONENT, out=magic.view(np.uint32))
        np.maximum(magic, least, out=magic)
        np.multiply(magic, step, out=magic)
        np.add(total, magic, out=carry)
        np.subtract(carry, magic, out=carry)
        np.copysign(carry, total, out=carry)
        np.subtract(total, carry, out=magic)
        total[...] = carry
        carry, magic = magic, carry


def _feed_back_within(sums: Floats, dtype: DType) -> None:
    """The same, where elements may be beyond the range or not finite: those stay as they are, and leave nothing to the next row."""
    carry, back = np.zeros((2, sums.shape[1]), np.float32)
    rounded: Elements = np.empty(sums.shape[1], STORED[dtype])
    for total in sums:
        np.add(total, carry, out=total)
        narrow(total, dtype, rounded)
        widen(rounded, dtype, back)
        np.subtract(within(total, dtype), back, out=carry)
        np.nan_to_num(carry, copy=False, nan=0.0, posinf=0.0, neginf=0.0)


def random_bits(key: int, first: int, bits: Words, spare: Words) -> None:
    """The stream of ``Stochastic`` for elements ``first``, ``first + 1``, ... that have the same ``index >> 32``."""
    np.add(_COUNT[: len(bits)], np.uint32((first + key) % _WORD), out=bits)
    _mix(bits, spare)
    np.bitwise_xor(bits, np.uint32(((key >> 32) + (first >> 32) * 0x9E3779B9) % _WORD), out=bits)
    _mix(bits, spare)


def _mix(x: Words, spare: Words) -> None:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, None)):
        np.right_shift(x, np.uint32(shift), out=spare)
        np.bitwise_xor(x, spare, out=x)
        if factor is not None:
            np.multiply(x, np.uint32(factor), out=x)


def half_spacings(values: Floats, dtype: DType, spacing: Floats) -> None:
    """Half the spacing of ``dtype``'s numbers at each value, exactly.

    It is 0 where float32 has no number so small.
    """
    shape = FORMATS[dtype]
    np.bitwise_and(values.view(np.uint32), EXPONENT, out=spacing.view(np.uint32))
    np.maximum(spacing, np.float32(2.0 ** max(shape.smallest, -126)), out=spacing)
    np.multiply(spacing, np.float32(2.0 ** (-shape.mantissa - 1)), out=spacing)


def below_half_spacing(moves: Floats, values: Floats, dtype: DType, room: Floats, below: npt.NDArray[np.bool_]) -> None:
    """Set ``below`` where a finite move is smaller than half a spacing.

    The spacing is that of ``dtype``'s numbers at the value that the move starts from.     Not where float32 has nothing so small: no move is. ``moves`` become their magnitudes, and ``room`` is overwritten.
    """
    half_spacings(values, dtype, room)
    np.abs(moves, out=moves)
    np.less(moves, room, out=below)


def within(values: Floats, dtype: DType) -> Floats:
    """``values``, those beyond the range of an FP8 type cut to its largest."""
    largest = np.float32(dtype.largest)
    return np.clip(values, -largest, largest) if dtype in SATURATING else values


def _is_within(values: Floats, largest: float) -> bool:
    """Whether no magnitude is larger, told in a seventh of the time of counting; NaN is not within."""
    return values.size == 0 or bool(-largest <= float(values.min()) and float(values.max()) <= largest)


def _stochastic_bf16(values: Floats, stored: Elements, scratch: Scratch) -> None:
    """bf16 is the upper half of a float32: a carry out of the lower half plus a random number rounds it up."""
    bits = scratch.words[0, : values.size]
    np.right_shift(bits, np.uint32(16), out=bits)
    np.bitwise_xor(bits, np.uint32(0xFFFF), out=bits)
    np.add(bits, values.view(np.uint32), out=bits)
    np.right_shift(bits, np.uint32(16), out=bits)
    np.copyto(stored, bits, casting="unsafe")


def _stochastic_any(values: Floats, stored: Elements, dtype: DType, scratch: Scratch) -> None:
    """Scaling by powers of two, floor and differences of neighbours are exact, so that this is the definition."""
    count = values.size
    bits = scratch.words[0, :count]
    draw, size, floor, spacing = scratch.floats[1:5, :count]
    with np.errstate(all="ignore"):  # what is not finite is mended by the caller
        half_spacings(values, dtype, spacing)
        np.add(spacing, spacing, out=spacing)
        np.abs(values, out=size)
        np.divide(size, spacing, out=size)
        np.floor(size, out=floor)
        np.subtract(size, floor, out=size)
        np.multiply(size, np.float32(2**24), out=size)
        np.copyto(draw, np.right_shift(bits, np.uint32(8), out=bits), casting="same_kind")
        np.add(floor, np.less(draw, size, out=scratch.masks[0, :count]), out=floor)
        np.multiply(floor, spacing, out=floor)
        np.copysign(floor, values, out=floor)
    narrow(floor, dtype, stored)
