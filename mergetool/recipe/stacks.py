"""The LoRAs of one sum as one operand: factors side by side make one product."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from fractions import Fraction

from mergetool.recipe.graph import Call, Lora, Sum, Term

Stack = tuple[tuple[Fraction, str], ...]
"""LoRAs by name, each with its factor in the sum."""


def stack_loras(graph: Sum, products: Collection[str], *, first: int = 0) -> tuple[Sum, list[Stack]]:
    """Replace the LoRAs of every sum in ``graph`` by one stack, ``stack N``.

    Only those among ``products`` are stacked; what each stack holds is the second result.

    N counts from ``first``. A stack stands where the first of its LoRAs did.
    """
    stacks: list[Stack] = []
    here = tuple(
        (t.factor, t.operand.name) for t in graph.terms if isinstance(t.operand, Lora) and t.operand.name in products
    )
    terms: list[Term] = []
    if here:
        stacks.append(here)
    for term in graph.terms:
        operand = term.operand
        if isinstance(operand, Lora) and operand.name in products:
            if operand.name == here[0][1]:
                terms.append(Term(Fraction(1), Lora(stack_name(first))))
        elif isinstance(operand, Sum):
            inner, inner_stacks = stack_loras(operand, products, first=first + len(stacks))
            stacks += inner_stacks
            terms.append(Term(term.factor, inner))
        elif isinstance(operand, Call):
            arguments = []
            for argument in operand.arguments:
                inner, inner_stacks = stack_loras(argument, products, first=first + len(stacks))
                stacks += inner_stacks
                arguments.append(inner)
            terms.append(Term(term.factor, replace(operand, arguments=tuple(arguments))))
        else:
            terms.append(term)
    return Sum(tuple(terms)), stacks


def stack_name(number: int) -> str:
    """The name that a stack goes by in a graph."""
    return f"stack {number}"
