"""The whole models in an expression: which are subtracted, and which are averaged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from mergetool.ops.program import Add, Apply, Load, Scale, Subtract
from mergetool.recipe.graph import Call, Sum
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import Step

NOTHING = 0.005
"""Weights of a whole model below this are rounding of others."""


def differences(graph: Sum) -> list[tuple[str, str]]:
    """List every difference (x, y) that the expression takes.

    In each sum these are the models that are added with those that are subtracted.
    """
    return list(dict.fromkeys(_differences(graph)))


def _differences(value: Sum) -> Iterator[tuple[str, str]]:
    factors: dict[str, Fraction] = {}
    for term in value.terms:
        operand = term.operand
        if isinstance(operand, Call):
            for argument in operand.arguments:
                yield from _differences(argument)
        elif isinstance(operand, Sum):
            yield from _differences(operand)
        alone = Sum((term,))
        if alone.degree() != 0:  # a model, or one made of several
            for name, factor in alone.coefficients().items():
                factors[name] = factors.get(name, Fraction(0)) + factor
    added = [name for name, factor in factors.items() if factor > 0]
    yield from ((x, y) for x in added for y, factor in factors.items() if factor < 0)


def whole_models(plan: Plan, step: Step) -> list[str]:
    """List the models that one step adds whole, beside the differences it takes. Two or more of them are averaged.

    Of ``a + 20 * (b - c)`` that is a, of ``0.5*a + 0.5*b`` and of ``a + 0.5 * (b - a)`` both.
    """
    factors = _factors(step)
    weights = {plan.inputs[column].name: factor for column, factor in factors.items()}
    for x, y in differences(plan.expression.graph):
        more, less = weights.get(x, 0.0), weights.get(y, 0.0)
        if more * less < 0:
            taken = math.copysign(min(abs(more), abs(less)), more)
            weights[x], weights[y] = more - taken, less + taken
    return [name for name, weight in weights.items() if weight > NOTHING]


def _factors(step: Step) -> dict[int, float]:
    """The factor of every input in a step's program; a method call counts as the mean of its arguments."""
    registers: dict[int, dict[int, float]] = {}
    for each in step.program.instructions if step.program else ():
        match each:
            case Load():
                registers[each.register] = {step.windows[each.model].input: 1.0}
            case Scale():
                registers[each.register] = _scaled(registers[each.register], each.factor)
            case Add():
                registers[each.register] = _added(registers[each.register], registers[each.other])
            case Subtract():
                registers[each.register] = _added(registers[each.register], _scaled(registers[each.other], -1))
            case Apply():
                total: dict[int, float] = {}
                for argument in each.arguments:
                    total = _added(total, {} if argument is None else registers[argument])
                registers[each.register] = _scaled(total, 1 / len(each.arguments))
    return registers.get(0, {})


def _scaled(factors: dict[int, float], by: float) -> dict[int, float]:
    return {column: factor * by for column, factor in factors.items()}


def _added(some: dict[int, float], others: dict[int, float]) -> dict[int, float]:
    return {column: some.get(column, 0.0) + others.get(column, 0.0) for column in dict.fromkeys((*some, *others))}
