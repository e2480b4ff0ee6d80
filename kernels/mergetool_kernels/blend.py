"""The fused merge kernel: stored elements in, float32 arithmetic, stored elements out. It reads several models.

Each byte is read once and written once. The arithmetic is a short program over float32 registers that is unrolled when
the kernel is compiled, one IEEE operation an instruction, never contracted (``enable_fp_fusion=False``), so the bytes
are the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergetool_kernels.formats import (
    E4M3,
    E5M2,
    F32,
    KIND,
    NEAREST,
    STOCHASTIC,
    carrier,
    decode,
    encode,
    largest,
    spacing,
    uniform_bits,
)

LOAD = tl.constexpr(0)
SCALE = tl.constexpr(1)
ADD = tl.constexpr(2)
SUBTRACT = tl.constexpr(3)

REGISTERS = 4
"""The deepest nesting of a program; a plain ``a + m * (b - c)`` needs 3."""

INPUTS = 16
"""The most operands of one launch."""

UNSCALED = tl.constexpr(0)
PER_TENSOR = tl.constexpr(1)
PER_ROW = tl.constexpr(2)
PER_BLOCK = tl.constexpr(3)

# Columns of the per-block counts and sums.
NON_FINITE, BEYOND, MOVED, EATEN, BELOW_HALF_ULP = range(5)
_COUNTS = 5
DELTA_ENERGY, PROJECTION = range(2)
_SUMS = 2

Branch = Literal["native", "integer", "interpreter"]


@dataclass(frozen=True, slots=True)
class KernelOperand:
    """One stored input of n elements: a contiguous tensor and its scales.

    Values are multiplied by the scales when they are read.

    ``scales`` is float32: [1] for the whole tensor; [rows] or [rows, ceil(columns / block)] for rows of ``columns``
    elements, where the operand begins at a row. None: stored values are the values.
    """

    values: Tensor
    scales: Tensor | None = None
    columns: int = 0
    block: int = 0


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """The results of a launch on the device, besides the output.

    ``counts`` [blocks, 5] int32 and ``sums`` [blocks, 2] float64 hold a row for every block of elements; sum over
    them. They are None unless they were asked for; without a base only the first two counts are more than 0.
    BEYOND counts elements that FP8 cut to its largest value, and finite ones that became infinite in FP16 or BF16.
    ``branch`` is the way the formats were converted.
    """

    counts: Tensor | None
    sums: Tensor | None
    branch: Branch


@triton.jit
def _pick(INDEX: tl.constexpr, r0, r1, r2, r3):
    if INDEX == 0:
        return r0
    elif INDEX == 1:
        return r1
    elif INDEX == 2:
        return r2
    else:
        return r3


@triton.jit
def _load(pointer, index, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer + index)
    else:
        return tl.load(pointer + index, mask=inside, other=0)


@triton.jit
def _operand(values, scales, start, index, inside, KIND: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr,
             GROUP: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr):  # fmt: skip
    """Float32 of the operand's elements ``start + index``."""
    value = decode(_load(values + start, index, inside, EVEN), KIND, NATIVE)
    if SCALED == PER_TENSOR:
        value = value * tl.load(scales)
    elif SCALED == PER_ROW:
        value = value * _load(scales, (start + index) // COLUMNS, inside, EVEN)
    elif SCALED == PER_BLOCK:
        groups: tl.constexpr = (COLUMNS + GROUP - 1) // GROUP
        place = (start + index) // COLUMNS * groups + (start + index) % COLUMNS // GROUP
        value = value * _load(scales, place, inside, EVEN)
    return value


@triton.jit(do_not_specialize=["key0", "key1", "first"])
def blend_kernel(
    values, scales, factors, out, inverse_scale, counts, sums, key0, key1, first, n,
    PROGRAM: tl.constexpr, KINDS: tl.constexpr, SCALED: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    OUT: tl.constexpr, OUT_SCALED: tl.constexpr, OUT_COLUMNS: tl.constexpr, ROUNDING: tl.constexpr,
    BASE: tl.constexpr, COUNT: tl.constexpr, NATIVE: tl.constexpr, EVEN: tl.constexpr,
    BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """``out[i] = encode(program(values[:][i]))`` for ``i < n``.

    Each block has TILES tiles, and a row of counts and sums.
    """
    lane = tl.arange(0, BLOCK)
    block = tl.program_id(0).to(tl.int64)
    tally = tl.zeros((BLOCK,), tl.int32)  # five counts of at most TILES, six bits each
    energy = tl.zeros((BLOCK,), tl.float32)
    projection = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        start = (block * TILES + tile) * BLOCK
        inside = start + lane < n
        r0 = tl.zeros((BLOCK,), tl.float32)
        r1 = r0
        r2 = r0
        r3 = r0
        base = r0
        for step in tl.static_range(len(PROGRAM)):  # (operation, register, argument)
            if PROGRAM[step][0] == LOAD:
                value = _operand(
                    values[PROGRAM[step][2]], scales[PROGRAM[step][2]], start, lane, inside, KINDS[PROGRAM[step][2]],
                    SCALED[PROGRAM[step][2]], COLUMNS[PROGRAM[step][2]], GROUPS[PROGRAM[step][2]], EVEN, NATIVE,
                )  # fmt: skip
                if PROGRAM[step][2] == BASE:
                    base = value
            elif PROGRAM[step][0] == SCALE:
                value = _pick(PROGRAM[step][1], r0, r1, r2, r3) * factors[PROGRAM[step][2]]
            elif PROGRAM[step][0] == ADD:
                value = _pick(PROGRAM[step][1], r0, r1, r2, r3) + _pick(PROGRAM[step][2], r0, r1, r2, r3)
            else:
                value = _pick(PROGRAM[step][1], r0, r1, r2, r3) - _pick(PROGRAM[step][2], r0, r1, r2, r3)
            if PROGRAM[step][1] == 0:
                r0 = value
            elif PROGRAM[step][1] == 1:
                r1 = value
            elif PROGRAM[step][1] == 2:
                r2 = value
            else:
                r3 = value
        scaled = r0
        if OUT_SCALED == PER_TENSOR:
            inverse = tl.load(inverse_scale)
            scaled = r0 * inverse
        elif OUT_SCALED == PER_ROW:
            inverse = _load(inverse_scale, (start + lane) // OUT_COLUMNS, inside, EVEN)
            scaled = r0 * inverse
        random = tl.zeros((BLOCK,), tl.uint32)
        if ROUNDING == STOCHASTIC:
            random = uniform_bits(first + start + lane, key0, key1)
        stored = encode(scaled, random, OUT, ROUNDING, NATIVE)
        if EVEN:
            tl.store(out + start + lane, stored)
        else:
            tl.store(out + start + lane, stored, mask=inside)
        if COUNT:
            finite = tl.abs(r0) < float("inf")
            tally += (inside & (finite == 0)).to(tl.int32)
            if OUT == E4M3 or OUT == E5M2:
                tally += (inside & (tl.abs(scaled) > largest(OUT))).to(tl.int32) << 6
            elif OUT != F32:
                infinite = tl.abs(decode(stored, OUT, NATIVE)) == float("inf")
                tally += (inside & finite & infinite).to(tl.int32) << 6
            if BASE >= 0:
                plain = base
                if OUT_SCALED != UNSCALED:
                    plain = base * inverse
                untouched = decode(encode(plain, random, OUT, NEAREST, NATIVE), OUT, NATIVE)
                came = decode(stored, OUT, NATIVE)
                change = came - untouched
                known = inside & finite & (tl.abs(change) < float("inf"))
                delta = tl.where(known, r0 - base, 0.0)
                change = tl.where(known, change, 0.0)
                size = tl.abs(delta)
                if OUT_SCALED != UNSCALED:
                    size = size * inverse
                    change = change / inverse
                moved = delta != 0.0
                tally += moved.to(tl.int32) << 12
                tally += (moved & (came == untouched)).to(tl.int32) << 18
                tally += (moved & (size < spacing(plain, OUT, -1))).to(tl.int32) << 24
                energy += delta * delta
                projection += delta * change
    if COUNT:
        for field in tl.static_range(5):
            tl.store(counts + block * 5 + field, tl.sum((tally >> (6 * field)) & 63))
        if BASE >= 0:
            tl.store(sums + block * 2, tl.sum(energy.to(tl.float64)))
            tl.store(sums + block * 2 + 1, tl.sum(projection.to(tl.float64)))


def native_formats(device: torch.device) -> bool:
    """True where the GPU converts BF16 and FP8 in hardware (compute capability 8.9 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def fits(program: Sequence[tuple[int, int, int]], operands: Sequence[KernelOperand]) -> bool:
    """Whether one launch can take this program."""
    return len(operands) <= INPUTS and max(register for _, register, _ in program) < REGISTERS


def blend(
    program: Sequence[tuple[int, int, int]],
    operands: Sequence[KernelOperand],
    factors: Sequence[float],
    out: Tensor,
    *,
    inverse_scale: Tensor | None = None,
    out_columns: int = 0,
    stochastic_key: int | None = None,
    first: int = 0,
    base: int | None = None,
    count: bool = True,
    native: bool | None = None,
    block: int | None = None,
    warps: int | None = None,
    tiles: int | None = None,
) -> LaunchResult:
    """Run ``program`` over the ``operands``, and store its register 0 in ``out``. All are of n elements on one device.

    ``program`` is a sequence of (operation, register, argument): LOAD an operand, SCALE by ``factors[argument]``
    (rounded to float32), ADD or SUBTRACT another register. ``out`` may be BF16, FP16, float32, e4m3 or e5m2; its values
    are ``register * inverse_scale`` where that is given, [1] or [rows] float32. ``stochastic_key`` (64 bits) rounds at
    random instead of to nearest; ``first`` is then the index of the first element in its tensor. ``base`` is the
    operand that the delta of the statistics is taken from. ``native`` None chooses the conversions the device is
    fastest at.

    Raises ValueError for operands of different lengths, and for more operands or registers than a launch takes.
    """
    n = out.numel()
    if any(operand.values.numel() != n for operand in operands):
        raise ValueError(f"operands of {[o.values.numel() for o in operands]} elements for an output of {n}")
    if not fits(program, operands):
        raise ValueError(f"a launch takes {INPUTS} operands and {REGISTERS} registers")
    native = native_formats(out.device) if native is None else native
    branch: Branch = "native" if native else "integer" if out.device.type == "cuda" else "interpreter"
    # Of nine shapes the best on an H100: with counting, smaller tiles, more of them where less is read for each.
    block, warps = block or (1024 if count else 2048), warps or (4 if count else 8)
    tiles = tiles or (1 if not count else 4 if out.element_size() > 1 else 16)
    blocks = triton.cdiv(n, block * tiles)
    # The kernel writes every row, so nothing needs to be cleared.
    counts = torch.empty(blocks, _COUNTS, dtype=torch.int32, device=out.device) if count else None
    sums = torch.empty(blocks, _SUMS, dtype=torch.float64, device=out.device) if count and base is not None else None
    if n == 0:
        return LaunchResult(counts, sums, branch)
    key = stochastic_key or 0
    key0, key1 = (word - (word >> 31 << 32) for word in (key & 0xFFFFFFFF, key >> 32))  # as signed 32-bit
    blend_kernel[(blocks,)](
        tuple(carrier(operand.values) for operand in operands),
        tuple(out if operand.scales is None else operand.scales for operand in operands),
        tuple(factors) or (1.0,),
        carrier(out),
        inverse_scale,
        counts,
        sums,
        key0,
        key1,
        first,
        n,
        PROGRAM=tuple(tuple(step) for step in program),
        KINDS=tuple(KIND[operand.values.dtype] for operand in operands),
        SCALED=tuple(_scaling(operand) for operand in operands),
        COLUMNS=tuple(operand.columns for operand in operands),
        GROUPS=tuple(operand.block for operand in operands),
        OUT=KIND[out.dtype],
        OUT_SCALED=0 if inverse_scale is None else 1 if inverse_scale.numel() == 1 else 2,
        OUT_COLUMNS=out_columns,
        ROUNDING=NEAREST.value if stochastic_key is None else STOCHASTIC.value,
        BASE=-1 if base is None else base,
        COUNT=count,
        NATIVE=native,
        EVEN=n % (block * tiles) == 0,
        BLOCK=block,
        TILES=tiles,
        num_warps=warps,
        enable_fp_fusion=False,
    )
    return LaunchResult(counts, sums, branch)


def _scaling(operand: KernelOperand) -> int:
    if operand.scales is None:
        return 0
    return 1 if operand.scales.numel() == 1 else 3 if operand.block else 2
