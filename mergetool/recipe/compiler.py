"""Compile an expression's normal form to the program that an engine runs on one tensor."""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from mergetool.ops.program import Add, Apply, Instruction, Load, Program, Scale, Subtract
from mergetool.recipe.expression import Expression
from mergetool.recipe.graph import Call, Lora, Model, Operand, Sum, Term, normal


def float32(value: Fraction) -> float:
    """``value`` rounded to double, then to float32, as a Python float."""
    return float(struct.unpack("<f", struct.pack("<f", float(value)))[0])


def graph_of(
    expression: Expression,
    multiplier: Fraction = Fraction(1),
    absent: Collection[str] = (),
    unscaled: Collection[str] = (),
) -> Sum:
    """The graph to compute for one tensor.

    ``multiplier`` is its one of ``multipliers``, ``absent`` are the LoRAs that do not change it, ``unscaled`` those whose strength does not
    count, since they hold the tensor whole.

    With a multiplier m other than 1 the result is ``anchor + m * (expression - anchor)``: 0 leaves the anchor,
    1 is the expression itself, and when the expression is ``anchor + delta`` the delta is scaled before it is added.
    """
    whole = normal(expression.arithmetic.without(absent))
    if unscaled:
        whole = Sum(tuple(Term(Fraction(1), t.operand) if _is_of(t.operand, unscaled) else t for t in whole.terms))
    return whole if multiplier == 1 else _stretched(expression.anchor, whole, multiplier)


def compile_graph(graph: Sum, columns: Mapping[str, int]) -> Program:
    """The program of a graph; ``columns`` gives the index of each model and LoRA."""
    return Program(tuple(_sum(graph, 0, columns)))


def compile_merge(expression: Expression, columns: Mapping[str, int], multiplier: Fraction = Fraction(1)) -> Program:
    """The program of a tensor that every LoRA changes."""
    return compile_graph(graph_of(expression, multiplier), columns)


def _is_of(operand: Operand, loras: Collection[str]) -> bool:
    return isinstance(operand, Lora) and operand.name in loras


def _stretched(name: str, graph: Sum, multiplier: Fraction) -> Sum:
    first = Model(name)
    terms = graph.terms
    whole = next((i for i, t in enumerate(terms) if t.operand == first and t.factor == 1), None)
    if whole is not None:
        rest = terms[:whole] + terms[whole + 1 :]
        delta = rest[0] if len(rest) == 1 else Term(Fraction(1), Sum(rest)) if rest else None
    else:
        delta = Term(Fraction(1), Sum((Term(Fraction(1), graph), Term(Fraction(-1), first))))
    if delta is None or multiplier == 0:
        return Sum((Term(Fraction(1), first),))
    return Sum((Term(Fraction(1), first), Term(multiplier * delta.factor, delta.operand)))


def _sum(value: Sum, register: int, columns: Mapping[str, int]) -> Sequence[Instruction]:
    steps: list[Instruction] = []
    for i, term in enumerate(value.terms):
        target = register if i == 0 else register + 1
        operand = term.operand
        if isinstance(operand, Sum):
            steps += _sum(operand, target, columns)
        elif isinstance(operand, Call):
            steps += _call(operand, target, columns)
        else:
            steps.append(Load(target, columns[operand.name]))
        size = term.factor if i == 0 else abs(term.factor)
        if size != 1:
            steps.append(Scale(target, float32(size)))
        if i > 0:
            steps.append(Subtract(register, target) if term.factor < 0 else Add(register, target))
    return steps


def _call(call: Call, register: int, columns: Mapping[str, int]) -> Sequence[Instruction]:
    """The arguments one above the other, then the method; an argument without terms is zero and takes no register."""
    steps: list[Instruction] = []
    arguments: list[int | None] = []
    free = register
    for argument in call.arguments:
        arguments.append(free if argument.terms else None)
        if argument.terms:
            steps += _sum(argument, free, columns)
            free += 1
    return [*steps, Apply(register, call.method, tuple(arguments), call.parameters)]
