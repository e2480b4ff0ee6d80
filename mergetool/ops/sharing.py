"""Several programs over the same elements: what they compute alike is computed once.

A sweep ``a + m * (b - c)`` over m takes the same difference for every m. Such a value becomes an operand more, which is kept in
float32 while the programs run one after the other; each still goes through its own operations in its own order, so its result is,
bit for bit, what it is alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mergetool.ops.program import Add, Instruction, Load, Program, Scale, Subtract


@dataclass(frozen=True, slots=True)
class Operand:
    """The value that was loaded from operand ``number``."""

    number: int


@dataclass(frozen=True, slots=True)
class Product:
    """A value times a factor; values go by their place in `_Values`."""

    value: int
    factor: float


@dataclass(frozen=True, slots=True)
class Combined:
    """A sum, or with ``subtracted`` a difference, of two values."""

    value: int
    other: int
    subtracted: bool


Value = Operand | Product | Combined


@dataclass(frozen=True, slots=True)
class Shared:
    """``programs`` as they were given, but reading common values as operands.

    The operands numbered from ``first`` on are the results of ``common``, in their order; these may read the ones before.
    """

    first: int
    common: tuple[Program, ...]
    programs: tuple[Program, ...]

    @property
    def registers(self) -> int:
        """The most registers that any of the programs needs."""
        return max((program.registers for program in (*self.common, *self.programs)), default=1)


def share(programs: Sequence[Program], operands: int, costly: Collection[int] = ()) -> Shared:
    """``programs``, whose loads are of ``operands`` common operands, with what two of them need computed once.

    An operand is not worth keeping, since widening it again costs what copying it would, unless it is one of the ``costly`` ones.
    """
    values = _Values()
    results = [values.of(program) for program in programs]
    readers: dict[int, set[int]] = defaultdict(set)  # of each value the others that are made of it
    for number, value in enumerate(values.known):
        for part in _parts(value):
            readers[part].add(number)
    for place, result in enumerate(results):
        readers[result].add(-1 - place)
    kept: dict[int, int] = {}
    common = []
    for number, value in enumerate(values.known):  # a value comes after its parts
        worth = value.number in costly if isinstance(value, Operand) else True
        if worth and len(readers[number]) > 1:
            common.append(values.program(number, kept))
            kept[number] = operands + len(kept)
    return Shared(operands, tuple(common), tuple(values.program(result, kept) for result in results))


def _parts(value: Value) -> tuple[int, ...]:
    match value:
        case Operand():
            return ()
        case Product():
            return (value.value,)
        case Combined():
            return value.value, value.other


class _Values:
    """Every value that some programs go through, each known once."""

    def __init__(self) -> None:
        self.known: list[Value] = []
        self._places: dict[Value, int] = {}

    def of(self, program: Program) -> int:
        """The value that a program leaves in register 0."""
        registers: dict[int, int] = {}
        for step in program.instructions:
            match step:
                case Load():
                    value: Value = Operand(step.model)
                case Scale():
                    value = Product(registers[step.register], step.factor)
                case Add() | Subtract():
                    subtracted = isinstance(step, Subtract)
                    value = Combined(registers[step.register], registers[step.other], subtracted)
            registers[step.register] = self._place(value)
        return registers[0]

    def program(self, number: int, kept: dict[int, int]) -> Program:
        """What computes a value from operands, those of ``kept`` values among them."""
        return Program(tuple(self._steps(number, 0, kept)))

    def _steps(self, number: int, register: int, kept: dict[int, int]) -> list[Instruction]:
        if number in kept:
            return [Load(register, kept[number])]
        value = self.known[number]
        match value:
            case Operand():
                return [Load(register, value.number)]
            case Product():
                return [*self._steps(value.value, register, kept), Scale(register, value.factor)]
            case Combined():
                last = (Subtract if value.subtracted else Add)(register, register + 1)
                parts = (value.value, register), (value.other, register + 1)
                return [*(step for part, at in parts for step in self._steps(part, at, kept)), last]

    def _place(self, value: Value) -> int:
        if value not in self._places:
            self._places[value] = len(self.known)
            self.known.append(value)
        return self._places[value]
