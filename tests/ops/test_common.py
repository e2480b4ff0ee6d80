"""Programs that share: the same operations on every element in the same order, common ones done once."""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from mergetool.ops.common import Shared, share
from mergetool.ops.program import Add, Apply, Instruction, Load, Program, Scale, Subtract


def sweep(factor: float) -> Program:
    return Program((Load(0, 0), Load(1, 1), Load(2, 2), Subtract(1, 2), Scale(1, factor), Add(0, 1)))


def run(program: Program, operands: list[np.ndarray]) -> np.ndarray:
    """A program's result in numpy; a method is a weighted sum that depends on the order of its arguments."""
    registers: dict[int, np.ndarray] = {}
    for step in program.instructions:
        match step:
            case Load():
                registers[step.register] = operands[step.model].copy()
            case Scale():
                registers[step.register] *= np.float32(step.factor)
            case Add():
                registers[step.register] += registers[step.other]
            case Subtract():
                registers[step.register] -= registers[step.other]
            case Apply():
                zero = np.zeros_like(operands[0])
                arguments = [zero if a is None else registers[a] for a in step.arguments]
                registers[step.register] = sum((i + 1) * a for i, a in enumerate(arguments)).astype(np.float32)
    return registers[0]


def check(programs: list[Program], shared: Shared) -> None:
    """Every program's result is what it is alone."""
    operands = list(np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32))
    expected = [run(program, operands) for program in programs]
    for program in shared.common:
        operands.append(run(program, operands))
    for program, result in zip(shared.programs, expected, strict=True):
        assert run(program, operands).tobytes() == result.tobytes()


def count(shared: Shared, kind: type[Instruction]) -> int:
    everything = (*shared.common, *shared.programs)
    return sum(isinstance(step, kind) for program in everything for step in program.instructions)


def test_the_difference_of_a_sweep_is_computed_once() -> None:
    programs = [sweep(5), sweep(10), sweep(20)]
    shared = share(programs, 3)
    assert shared.common == (Program((Load(0, 1), Load(1, 2), Subtract(0, 1))),)
    assert shared.programs[1] == Program((Load(0, 0), Load(1, 3), Scale(1, 10), Add(0, 1)))
    check(programs, shared)


def test_what_is_costly_to_load_is_loaded_once() -> None:
    programs = [sweep(5), sweep(10)]
    shared = share(programs, 3, costly=[0])
    loads = [step for program in (*shared.common, *shared.programs) for step in program.instructions]
    assert loads.count(Load(0, 0)) == 1
    check(programs, shared)


def test_a_program_that_is_there_twice_is_run_once() -> None:
    programs = [sweep(5), sweep(5)]
    shared = share(programs, 3)
    assert count(shared, Subtract) == count(shared, Add) == 1
    check(programs, shared)


def test_programs_with_nothing_in_common_are_as_they_were() -> None:
    programs = [sweep(5), Program((Load(0, 2),))]
    assert share(programs, 3) == Shared((), tuple(programs))


def test_a_method_call_is_shared_when_arguments_and_parameters_are_the_same() -> None:
    def call(t: int, factor: float) -> Program:
        apply = Apply(0, "mix", (0, None, 1), (("t", Fraction(t)),))
        return Program((Load(0, 1), Load(1, 2), apply, Scale(0, factor)))

    programs = [call(1, 2), call(1, 3), call(2, 3)]
    shared = share(programs, 3)
    assert count(shared, Apply) == 2
    check(programs, shared)


def test_swapped_operands_are_not_the_same_value() -> None:
    swapped = Program((Load(0, 0), Load(1, 2), Load(2, 1), Subtract(1, 2), Scale(1, 5), Add(0, 1)))
    programs = [sweep(5), swapped]
    shared = share(programs, 3)
    assert count(shared, Subtract) == 2
    check(programs, shared)
