"""Kernels for the processor, compiled from C at installation. They import neither torch nor triton.

sums([(raw, BFLOAT16, 1), (other, BFLOAT16, 1)], count)     [of base, of variant, of their delta, 0.0, 0.0, 0.0]
blend([(LOAD, 0, 0), (LOAD, 1, 1), (SCALE, 1, 0), (ADD, 0, 1)], [0.5], [(raw, BFLOAT16, 1), (other, FLOAT16, 1)], count, out, BFLOAT16)
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

LIBRARY = Path(__file__).with_name("for_processor.dll" if sys.platform == "win32" else "for_processor.so")
FLOAT32, BFLOAT16, FLOAT16, FLOAT8_E4M3, FLOAT8_E5M2 = range(5)
LOAD, SCALE, ADD, SUBTRACT = range(4)
REGISTERS = 8
"""Registers that a program of `blend` may have."""
_WIDTHS = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2, FLOAT8_E4M3: 1, FLOAT8_E5M2: 1}
_MODELS, _SUMS = 5, 6

StoredElements = tuple[memoryview, int, float]
"""Stored elements at any address, their type, `FLOAT32` to `FLOAT8_E5M2`, and a float32 factor for each."""
CompiledStep = tuple[int, int, int]
"""An operation, its register, and its argument: an operand (`LOAD`), a factor (`SCALE`) or a register."""


class MovementSums(NamedTuple):
    """The movement of the first model, in the order of `mergetool.ops.movement.Movement`."""

    moved: int
    eaten: int
    below_half_ulp: int
    delta_energy: float
    kept_energy: float


class BlendResult(NamedTuple):
    """The findings of `blend`: ordinary or not, the largest magnitude, the movement.

    The magnitude is before rounding; the movement is the first model's.

    The magnitude is before rounding.
    """

    is_ordinary: bool
    largest: float
    movement: MovementSums | None


class _Movement(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in MovementSums._fields[:3]),
        *((name, ctypes.c_double) for name in MovementSums._fields[3:]),
    )


def is_available() -> bool:
    """Whether the library was built for this machine."""
    return _library() is not None


def sums(models: Sequence[StoredElements | None], count: int) -> list[float]:
    """Six sums over ``count`` elements of up to five models side by side.

    The models are base, variant, the one that the delta is added to, and a reference with its base.

    They are: of the squares of base, variant, delta = variant - base, of what it is added to, of the reference delta, and of delta *
    reference delta. Deltas are float32; products are added up in float32 by runs of 1024, and those, like runs whose squares leave float32,
    in float64. The same on every processor. A sum is not finite only when an element, or a difference in float32, is not. The interpreter's
    lock is free meanwhile. Raises ValueError for too few bytes, RuntimeError where `is_available` is False.
    """
    found = (ctypes.c_double * _SUMS)()
    _built().mergetool_sums(*_operands(models, count, _MODELS), count, found)
    return list(found)


def blend(
    program: Sequence[CompiledStep],
    factors: Sequence[float],
    operands: Sequence[StoredElements],
    count: int,
    out: memoryview,
    kind: int,
    first: int | None = None,
    *,
    saturating: bool = False,
    stochastic: tuple[int, int] | None = None,
) -> BlendResult:
    """Run a program over ``count`` elements, and round register 0 into ``out`` as ``kind``. It rounds to nearest even.

    ``stochastic`` is a 64-bit key and the number of the first element, by whose random bits it is rounded instead, see
    `mergetool.ops.rounding.Stochastic`.

    Every step is one IEEE float32 operation an element. With ``first``, an operand, also what became of its elements. It is not ordinary, and
    nothing of use was written, when a result (with ``first`` also one of its elements) is not finite, beyond the largest number of ``kind``,
    which ``saturating`` makes of what is beyond, or of 2**126 or more. The interpreter's lock is free meanwhile. Raises ValueError for too
    few bytes and for a step that names what is not there, RuntimeError where `is_available` is False.
    """
    library = _built()
    if len(out) < count * _WIDTHS[kind]:
        raise ValueError(f"the output has {len(out)} bytes, and is to take {count} elements")
    bounds = {LOAD: len(operands), SCALE: len(factors), ADD: REGISTERS, SUBTRACT: REGISTERS}
    for step in program:
        operation, target, argument = step
        if not (operation in bounds and 0 <= target < REGISTERS and 0 <= argument < bounds[operation]):
            raise ValueError(f"the step {step} names what is not there")
    if first is not None and not 0 <= first < len(operands):
        raise ValueError(f"there is no operand {first}")
    steps = np.array(program, np.int32)
    numbers = np.array(factors, np.float32)
    room, largest, found = np.frombuffer(out, np.uint8), ctypes.c_float(), _Movement()
    is_ordinary = library.mergetool_blend(
        steps.ctypes.data, len(steps), numbers.ctypes.data, *_operands(operands, count, len(operands)),
        count, -1 if first is None else first, room.ctypes.data, kind, saturating, stochastic is not None,
        *(stochastic or (0, 0)), ctypes.byref(largest), ctypes.byref(found),
    )  # fmt: skip
    return BlendResult(bool(is_ordinary), largest.value, None if first is None else _movement(found))


def moves(
    result: memoryview, first: memoryview, came: memoryview, alone: memoryview, kind: int, scale: float
) -> MovementSums | None:
    """Measure the effect of storing a weight that is quantised with one scale.

    Given are its ``result`` and the ``first`` model's elements, both float32, and the codes of ``kind`` that each is
    stored as. Half a unit is of the first model's code.

    Sums are in float64. None when an element is not finite. The interpreter's lock is free meanwhile. Raises ValueError for lengths that do not
    fit, RuntimeError where `is_available` is False.
    """
    library, found, count = _built(), _Movement(), result.nbytes // 4
    if not (first.nbytes == result.nbytes and came.nbytes == alone.nbytes == count * _WIDTHS[kind]):
        raise ValueError(
            f"{result.nbytes}, {first.nbytes}, {came.nbytes} and {alone.nbytes} bytes are not of the same elements"
        )
    parts = [np.frombuffer(part, np.uint8) for part in (result, first, came, alone)]
    addresses = [part.ctypes.data for part in parts]
    if not library.mergetool_moves(*addresses, kind, scale, count, ctypes.byref(found)):
        return None
    return _movement(found)


def _movement(found: _Movement) -> MovementSums:
    return MovementSums(*(getattr(found, name) for name in MovementSums._fields))


def _operands(
    models: Sequence[StoredElements | None], count: int, places: int
) -> tuple[ctypes.Array[ctypes.c_void_p], ctypes.Array[ctypes.c_int], ctypes.Array[ctypes.c_float]]:
    """The models' elements: addresses, types and factors."""
    addresses, kinds, scales = (ctypes.c_void_p * places)(), (ctypes.c_int * places)(), (ctypes.c_float * places)()
    for place, model in enumerate(models):
        if model is not None:
            raw, kind, scale = model
            if raw.nbytes < count * _WIDTHS[kind]:
                raise ValueError(f"model {place} has {raw.nbytes} bytes, and {count} elements of it were asked for")
            addresses[place] = np.frombuffer(raw, np.uint8).ctypes.data if count else None
            kinds[place], scales[place] = kind, scale
    return addresses, kinds, scales


def _built() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError("the compiled kernels are not built; install mergetool where there is a C compiler")
    return library


def obstacle() -> str:
    """Say why the library is not used; "" where it is."""
    if is_available():
        return ""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} is not there, since there was no C compiler when mergetool was installed"
    try:
        ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} cannot be loaded ({error})"
    return f"{LIBRARY} is of another version of mergetool"


def compiler() -> str:
    """The compiler that made the library, with its version.

    It is "" where there is no library, or one of an older version that does not say.
    """
    return _text("mergetool_compiler")


def instructions() -> str:
    """The vector instructions that the library uses on this processor; "" as for `compiler`."""
    return _text("mergetool_instructions")


def _text(function: str) -> str:
    told = getattr(_library(), function, None)
    if told is None:
        return ""
    told.restype, told.argtypes = ctypes.c_char_p, []
    return (told() or b"").decode()


@cache
def _library() -> ctypes.CDLL | None:
    try:
        return _typed(ctypes.CDLL(str(LIBRARY)))
    except (OSError, AttributeError):  # not there, not for this system, or of another version
        return None


def _typed(library: ctypes.CDLL) -> ctypes.CDLL:
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.mergetool_sums.argtypes = [pointer, pointer, pointer, ctypes.c_size_t, pointer]
    library.mergetool_sums.restype = None
    library.mergetool_blend.argtypes = [
        pointer, number, pointer, pointer, pointer, pointer, ctypes.c_size_t, number, pointer, number,
        number, number, ctypes.c_uint64, ctypes.c_uint64, pointer, pointer,
    ]  # fmt: skip
    library.mergetool_blend.restype = number
    library.mergetool_moves.argtypes = [
        pointer, pointer, pointer, pointer, number, ctypes.c_float, ctypes.c_size_t, pointer,
    ]  # fmt: skip
    library.mergetool_moves.restype = number
    return library
