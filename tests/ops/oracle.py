"""The merge arithmetic once more, in numpy, written to be read: what the engine is held against.

Nothing is shared with the torch path but the dtype table: stored bytes are decoded from their bit patterns, the
program runs on whole arrays, in float32 (``run(..., np.float32)``: the engine's bytes) or in float64 (the truth).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.ops.movement import Movement
from mergetool.ops.program import Add, Apply, Load, Program, Scale
from mergetool.ops.rounding import FORMATS, ErrorFeedback, Nearest, Rounding, Stochastic

FloatArray = npt.NDArray[Any]
MethodFunction = Callable[[Apply, Sequence[FloatArray]], FloatArray]


def decode(raw: bytes, dtype: DType) -> npt.NDArray[np.float64]:
    """Stored little-endian bytes as float64, exactly.

    Raises ValueError for a dtype that is not blended.
    """
    if dtype in (dtypes.F64, dtypes.F32, dtypes.F16):
        return np.frombuffer(raw, f"<f{dtype.itemsize}").astype(np.float64)
    if dtype is dtypes.BF16:
        bits = np.frombuffer(raw, "<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64)
    if dtype is dtypes.F8_E4M3:
        return _small_float(np.frombuffer(raw, np.uint8), mantissa=3, bias=7, finite_only=True)
    if dtype is dtypes.F8_E5M2:
        return _small_float(np.frombuffer(raw, np.uint8), mantissa=2, bias=15, finite_only=False)
    raise ValueError(f"{dtype.code} is not a blended dtype")


def _small_float(
    codes: npt.NDArray[np.uint8], *, mantissa: int, bias: int, finite_only: bool
) -> npt.NDArray[np.float64]:
    """OCP 8-bit floating point (OFP8, revision 1.0): sign, exponent, mantissa; e4m3 has NaN at 0x7F and no infinity."""
    table = np.empty(256)
    top = (1 << (7 - mantissa)) - 1
    for code in range(256):
        exponent, fraction = (code & 0x7F) >> mantissa, code & ((1 << mantissa) - 1)
        scaled = fraction / (1 << mantissa)
        value = (1 + scaled) * 2.0 ** (exponent - bias) if exponent else scaled * 2.0 ** (1 - bias)
        if finite_only and code & 0x7F == 0x7F:
            value = np.nan
        elif not finite_only and exponent == top:
            value = np.nan if fraction else np.inf
        table[code] = -value if code & 0x80 else value
    return table[codes]


def run(
    program: Program,
    inputs: Sequence[FloatArray],
    precision: type[np.floating[Any]] = np.float64,
    methods: Mapping[str, MethodFunction] = MappingProxyType({}),
) -> FloatArray:
    """The program's result over whole arrays, each instruction rounded to ``precision`` (float64 or float32).

    ``methods`` are what its method calls mean, each a function of the call and its arguments.
    """
    registers: dict[int, FloatArray] = {}
    with np.errstate(all="ignore"):
        for step in program.instructions:
            if isinstance(step, Load):
                registers[step.register] = inputs[step.model].astype(precision)
            elif isinstance(step, Scale):
                registers[step.register] = registers[step.register] * precision(step.factor)
            elif isinstance(step, Add):
                registers[step.register] = registers[step.register] + registers[step.other]
            elif isinstance(step, Apply):
                zero = np.zeros(inputs[0].shape, precision)
                given = [zero if register is None else registers[register] for register in step.arguments]
                registers[step.register] = methods[step.method](step, given)
            else:
                registers[step.register] = registers[step.register] - registers[step.other]
    return registers[0]


def store(values: FloatArray, dtype: DType, rounding: Rounding) -> bytes:
    """Float32 values rounded to a stored dtype as ``rounding`` says; fp32 holds them all."""
    if dtype is dtypes.F32 or isinstance(rounding, Nearest):
        return encode(values, dtype)
    exact = np.ascontiguousarray(values, dtype=np.float32)
    if isinstance(rounding, Stochastic):
        return _stochastic(exact, dtype, rounding)
    return _error_feedback(exact, dtype, rounding)


def random_bits(rounding: Stochastic, count: int) -> npt.NDArray[np.uint32]:
    """32 random bits for each of ``count`` elements, by the definition in ``Stochastic``, in Python's integers."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    low, high = rounding.key % 2**32, rounding.key >> 32
    bits = []
    for i in range(rounding.first, rounding.first + count):
        word = mix((i + low) % 2**32)
        bits.append(mix(word ^ (high + (i >> 32) * 0x9E3779B9) % 2**32))
    return np.array(bits, np.uint32)


def spacing(values: FloatArray, dtype: DType) -> FloatArray:
    """The distance of neighbouring numbers of ``dtype`` around each finite value, in float64."""
    shape = FORMATS[dtype]
    exponent = np.frexp(np.abs(values.astype(np.float64)))[1] - 1
    exponent = np.where(values == 0, shape.smallest, np.maximum(exponent, shape.smallest))
    return np.exp2((exponent - shape.mantissa).astype(np.float64))


def _stochastic(values: npt.NDArray[np.float32], dtype: DType, rounding: Stochastic) -> bytes:
    draws = (random_bits(rounding, len(values)) >> np.uint32(8)) * 2.0**-24
    inside = np.abs(values) < dtype.largest
    size = np.abs(np.where(inside, values, 0).astype(np.float64))
    step = spacing(np.where(inside, values, 0), dtype)
    whole, rest = np.divmod(size / step, 1)
    grown = np.copysign((whole + (draws < rest)) * step, values)
    return encode(np.where(inside, grown.astype(np.float32), values), dtype)


def _error_feedback(values: npt.NDArray[np.float32], dtype: DType, rounding: ErrorFeedback) -> bytes:
    stored = b""
    for row in values.reshape(-1, rounding.row):
        carried = np.float32(0)
        for value in row:
            with np.errstate(all="ignore"):
                wanted = np.float32(value + carried)
                code = encode(np.array([wanted]), dtype)
                carried = np.float32(wanted - decode(code, dtype)[0])
            capped = dtype.bits == 8 and abs(wanted) > dtype.largest
            if capped or not np.isfinite(carried):
                carried = np.float32(0)
            stored += code
    return stored


def measure(result: FloatArray, first: FloatArray, stored: bytes, dtype: DType) -> Movement:
    """The figures of ``Movement`` for float32 ``result`` and ``first``, by their definition, in float64."""
    with np.errstate(all="ignore"):
        d = (result.astype(np.float32) - first.astype(np.float32)).astype(np.float64)
        kept = decode(stored, dtype) - decode(encode(first, dtype), dtype)
    counted = np.isfinite(d) & np.isfinite(kept) & (d != 0)
    d, kept, half = d[counted], kept[counted], spacing(first, dtype)[counted] / 2
    return Movement(
        moved=len(d),
        eaten=int((kept == 0).sum()),
        below_half_ulp=int((np.abs(d) < half).sum()),
        delta_energy=float((d * d).sum()),
        kept_energy=float((d * kept).sum()),
    )


def encode(values: FloatArray, dtype: DType) -> bytes:
    """Float32 values rounded once, to nearest even, to a stored dtype; FP8 saturates at its largest finite value."""
    exact = np.ascontiguousarray(values, dtype=np.float32)
    if dtype is dtypes.F32:
        return exact.tobytes()
    if dtype is dtypes.F16:
        with np.errstate(over="ignore"):
            return exact.astype("<f2").tobytes()
    if dtype is dtypes.BF16:
        bits = exact.view(np.uint32)
        rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> np.uint32(16)
        # torch writes every NaN as 0x7FC0.
        return np.where(np.isnan(exact), np.uint32(0x7FC0), rounded).astype("<u2").tobytes()
    if dtype in (dtypes.F8_E4M3, dtypes.F8_E5M2):
        return _nearest_small_float(exact.astype(np.float64), dtype)
    raise ValueError(f"{dtype.code} is not an output dtype")


def _nearest_small_float(values: npt.NDArray[np.float64], dtype: DType) -> bytes:
    codes = np.arange(128, dtype=np.uint8)
    table = decode(codes.tobytes(), dtype)
    table = table[np.isfinite(table)]
    size = np.minimum(np.abs(values), dtype.largest)
    above = np.clip(np.searchsorted(table, size), 1, len(table) - 1)
    low, high = table[above - 1], table[above]
    up = (high - size < size - low) | ((high - size == size - low) & (above % 2 == 0))
    chosen = np.where(np.isnan(values), 0x7F, np.where(up, above, above - 1)).astype(np.uint8)
    return (chosen | np.where(np.signbit(values), 0x80, 0).astype(np.uint8)).tobytes()
