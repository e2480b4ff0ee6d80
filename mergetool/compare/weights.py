"""What an expression does with whole models: which are subtracted from which, and which are averaged."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

from mergetool.ops.program import Add, Load, Scale, Subtract
from mergetool.recipe.graph import Model, Sum
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import Step

NOTHING = 0.005
"""Weights of a whole model below this are rounding of others."""


def differences(graph: Sum) -> list[tuple[str, str]]:
    """Every (x, y) of which x - y is taken: in each sum, the models that are added with those that are subtracted."""
    return list(dict.fromkeys(_differences(graph)))


def _differences(value: Sum) -> Iterator[tuple[str, str]]:
    factors: dict[str, Fraction] = {}
    for term in value.terms:
        operand = term.operand
        if isinstance(operand, Model):
            factors[operand.name] = factors.get(operand.name, Fraction(0)) + term.factor
        elif isinstance(operand, Sum):
            yield from _differences(operand)
            if operand.degree() != 0:  # a model made of several
                for name, factor in operand.coefficients().items():
                    factors[name] = factors.get(name, Fraction(0)) + term.factor * factor
    added = [name for name, factor in factors.items() if factor > 0]
    yield from ((x, y) for x in added for y, factor in factors.items() if factor < 0)


def whole_models(plan: Plan, step: Step) -> list[str]:
    """The models that one step adds as such, beyond the differences it takes: two or more of them are averaged.

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
    """The factor of every input in a step's linear program."""
    registers: dict[int, dict[int, float]] = {}
    for each in step.program.instructions if step.program else ():
        if isinstance(each, Load):
            registers[each.register] = {step.windows[each.model].input: 1.0}
        elif isinstance(each, Scale):
            registers[each.register] = {k: v * each.factor for k, v in registers[each.register].items()}
        elif isinstance(each, (Add, Subtract)):
            sign = -1.0 if isinstance(each, Subtract) else 1.0
            mine = registers[each.register]
            for column, factor in registers[each.other].items():
                mine[column] = mine.get(column, 0.0) + sign * factor
    return registers.get(0, {})
