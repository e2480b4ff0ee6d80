"""Several programs over the same elements: compute their common values once.

A sweep ``a + m * (b - c)`` over m takes the same difference for every m. Such a value becomes an operand more, which is kept in
float32 while the programs run one after the other; each still goes through its own operations in its own order, so its result is,
bit for bit, what it is alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mergetool.ops.program import Add, Apply, Instruction, Load, Program, Scale, Subtract


@dataclass(frozen=True, slots=True)
class _Loaded:
    operand: int


@dataclass(frozen=True, slots=True)
class _Made:
    """The effect of an instruction, with every register in it set to 0, on other values; ``parts`` are places in `_Values`."""

    step: Instruction
    parts: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class Shared:
    """``programs`` as they were given, but for reading common values as operands.

    The results of ``common``, in their order, are the operands that follow the given ones; each may read those before it.
    """

    common: tuple[Program, ...]
    programs: tuple[Program, ...]

    @property
    def registers(self) -> int:
        """The most registers that any of the programs needs."""
        return max((program.registers for program in (*self.common, *self.programs)), default=1)


def share(programs: Sequence[Program], operands: int, costly: Collection[int] = ()) -> Shared:
    """Find the values that several steps of ``programs`` need, to compute them once.

    The programs load ``operands`` common operands. An operand is not worth keeping, since widening it again costs what copying it would,
    unless it is one of the ``costly`` ones.
    """
    values = _Values()
    results = [values.of(program) for program in programs]
    readers: dict[int, set[int]] = defaultdict(
        set
    )  # of each value: those made of it, and the programs that end with it
    for place, value in enumerate(values.known):
        for part in value.parts if isinstance(value, _Made) else ():
            if part is not None:
                readers[part].add(place)
    for number, result in enumerate(results):
        readers[result].add(-1 - number)
    kept: dict[int, int] = {}
    common = []
    for place, value in enumerate(values.known):  # a value comes after its parts
        is_cheap = isinstance(value, _Loaded) and value.operand not in costly
        if len(readers[place]) > 1 and not is_cheap:
            common.append(values.program(place, kept))
            kept[place] = operands + len(kept)
    return Shared(tuple(common), tuple(values.program(result, kept) for result in results))


class _Values:
    """Every value that some programs go through, each known once."""

    def __init__(self) -> None:
        self.known: list[_Loaded | _Made] = []
        self._places: dict[_Loaded | _Made, int] = {}

    def of(self, program: Program) -> int:
        """The value that a program leaves in register 0."""
        registers: dict[int | None, int | None] = {None: None}
        for step in program.instructions:
            value: _Loaded | _Made
            match step:
                case Load():
                    value = _Loaded(step.model)
                case Scale():
                    value = _Made(Scale(0, step.factor), (registers[step.register],))
                case Add() | Subtract():
                    value = _Made(type(step)(0, 0), (registers[step.register], registers[step.other]))
                case Apply():
                    call = Apply(0, step.method, tuple(a if a is None else 0 for a in step.arguments), step.parameters)
                    value = _Made(call, tuple(registers[argument] for argument in step.arguments))
            if value not in self._places:
                self._places[value] = len(self.known)
                self.known.append(value)
            registers[step.register] = self._places[value]
        result = registers[0]
        assert result is not None
        return result

    def program(self, place: int, kept: Mapping[int, int]) -> Program:
        """The program that computes a value from the operands and the values in ``kept``, which maps those to operands."""
        return Program(tuple(self._steps(place, 0, kept)))

    def _steps(self, place: int, register: int, kept: Mapping[int, int]) -> list[Instruction]:
        value = self.known[place]
        if place in kept:
            return [Load(register, kept[place])]
        if isinstance(value, _Loaded):
            return [Load(register, value.operand)]
        steps: list[Instruction] = []
        places: list[int | None] = []
        for part in value.parts:  # one above the other
            free = register + len(places) - places.count(None)
            places.append(None if part is None else free)
            if part is not None:
                steps += self._steps(part, free, kept)
        match value.step:
            case Scale():
                return [*steps, Scale(register, value.step.factor)]
            case Add() | Subtract():
                return [*steps, type(value.step)(register, register + 1)]
            case Apply():
                return [*steps, Apply(register, value.step.method, tuple(places), value.step.parameters)]
            case Load():
                raise AssertionError
