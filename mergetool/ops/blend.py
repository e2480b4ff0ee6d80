"""A whole program in one pass on the CPU, from stored elements to stored elements. It does the ordinary cases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from mergetool.checkpoint.dtypes import DType
from mergetool.ops.movement import Movement
from mergetool.ops.program import Add, Load, Program, Scale, Subtract
from mergetool.ops.rounding import NEAREST, ErrorFeedback, Rounding, Stochastic
from mergetool.ops.stored import Stored, kind_of
from mergetool.quant.encoding import Floats
from mergetool_kernels import compiled


class Blended(NamedTuple):
    """A program's result as stored, with its measurements.

    That is its largest magnitude before storing, and what it did to the anchor where that was asked for.
    """

    stored: memoryview
    largest: float
    movement: Movement | None


def blend(
    program: Program,
    operands: Sequence[Stored | None],
    dtype: DType,
    room: memoryview,
    first: int | None = None,
    *,
    rounding: Rounding = NEAREST,
    saturating: bool = False,
) -> Blended | None:
    """Compute a program in one pass: the bytes of ``CpuOps.store``.

    With ``first``, the operand that is the anchor, it has the figures of ``CpuOps.measure`` too.

    ``operands`` are what the program loads, each a chunk of the same length. The result lies in ``room``, bytes of the caller's. None where
    that cannot be told in one pass, and `execute` with a ``CpuOps`` must: an operand is None or of a dtype that is not compiled, the program
    calls methods or has many registers, errors are to be fed back, or an element is not finite or beyond what the dtype holds. With ``saturating`` what is beyond
    becomes the dtype's largest value. The interpreter's lock is free meanwhile.
    """
    steps, kind = _steps(program), kind_of(dtype)
    if steps is None or kind is None or isinstance(rounding, ErrorFeedback):
        return None
    models = [*steps.models, *(() if first is None else (first,))]
    given = []
    for model in models:
        stored = operands[model]
        operand_kind = None if stored is None else kind_of(stored.dtype)
        if stored is None or operand_kind is None:
            return None
        given.append((stored.raw, operand_kind, stored.factor))
    raw, source, _ = operands[steps.models[0]] or Stored(room, dtype)
    count = raw.nbytes // source.itemsize
    out = room[: count * dtype.itemsize]
    is_ordinary, largest, movement = compiled.blend(
        steps.steps,
        steps.factors,
        given,
        count,
        out,
        kind,
        None if first is None else len(given) - 1,
        saturating=saturating,
        stochastic=(rounding.key, rounding.first) if isinstance(rounding, Stochastic) else None,
    )
    return Blended(out, largest, None if movement is None else Movement(*movement)) if is_ordinary else None


def moves(result: Floats, first: Floats, came: Stored, alone: memoryview) -> Movement | None:
    """Measure how storing changed elements of a weight quantised with one scale.

    ``came`` is what ``result`` is stored as, ``alone`` the codes of the ``first`` model's elements with the same scale. None where that is
    not compiled, or one of them is not finite.
    """
    kind = kind_of(came.dtype)
    if kind is None:
        return None
    counts = compiled.moves(result.data.cast("B"), first.data.cast("B"), came.raw, alone, kind, came.factor)
    return None if counts is None else Movement(*counts)


class _Steps(NamedTuple):
    """A program as the compiled kernel takes it: an operand is a place in ``models``."""

    steps: tuple[compiled.CompiledStep, ...]
    factors: tuple[float, ...]
    models: tuple[int, ...]


@cache
def _steps(program: Program) -> _Steps | None:
    """The kernel's steps for a program; None where it cannot do it."""
    if program.registers > compiled.REGISTERS or program.calls:
        return None
    steps: list[compiled.CompiledStep] = []
    factors: list[float] = []
    for step in program.instructions:
        match step:
            case Load():
                steps.append((compiled.LOAD, step.register, program.models.index(step.model)))
            case Scale():
                steps.append((compiled.SCALE, step.register, len(factors)))
                factors.append(step.factor)
            case Add():
                steps.append((compiled.ADD, step.register, step.other))
            case Subtract():
                steps.append((compiled.SUBTRACT, step.register, step.other))
    return _Steps(tuple(steps), tuple(factors), program.models)
