"""The values of links: expressions as text.

A MERGETOOL_MODEL is a model (degree 1), a MERGETOOL_DELTA a difference (degree 0).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from fractions import Fraction

from mergetool.errors import ExpressionError, UsageError
from mergetool.options.multipliers import number
from mergetool.recipe.expression import parse
from mergetool.recipe.graph import Model
from mergetool.recipe.quotes import one_line, syntax_tree

MODEL = "MERGETOOL_MODEL"
DELTA = "MERGETOOL_DELTA"

_ONE_OPERAND = re.compile(r"'[^']*'|\"[^\"]*\"|[A-Za-z_][A-Za-z0-9_.]*")


def difference(a: str, b: str, multiplier: float) -> str:
    """``multiplier * (a - b)``. Raises UsageError for a multiplier that is not finite."""
    return _scaled(multiplier, f"({a} - {_operand(b)})")


def total(model: str, delta: str, multiplier: float) -> str:
    """``model + multiplier * delta``. Raises UsageError for a multiplier that is not finite."""
    return f"{model} + {_scaled(multiplier, _operand(delta))}"


def filled(text: str, inputs: Mapping[str, str]) -> str:
    """Replace every name of ``inputs`` in ``text`` by its link, in parentheses.

    Only names in their own right: not those in quotes, after a dot or before a call's parenthesis. Text that is no expression comes back
    as it is, for the parser to say why.
    """
    source = text.strip()
    try:
        source = one_line(text).strip()
        tree = syntax_tree(source)
    except (ExpressionError, SyntaxError, ValueError, RecursionError, MemoryError):
        return source
    taken = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    taken |= {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in inputs and id(n) not in taken]
    raw = source.encode()  # columns count bytes
    for name in sorted(names, key=lambda name: name.col_offset, reverse=True):
        raw = raw[: name.col_offset] + _operand(inputs[name.id]).encode() + raw[name.end_col_offset :]
    return raw.decode()


def argument(text: str) -> str:
    """A link as a MODEL argument: a file by its own name, a merge as its expression."""
    graph = parse(text).graph
    only = graph.terms[0] if len(graph.terms) == 1 else None
    if only is None or only.factor != 1 or not isinstance(only.operand, Model):
        return text
    return only.operand.name


def _scaled(multiplier: float, operand: str) -> str:
    try:
        factor = Fraction(repr(multiplier))
    except ValueError:
        raise UsageError(f"the multiplier {multiplier!r} is not a finite number.") from None
    return operand if factor == 1 else f"({number(factor)})*{operand}" if factor < 0 else f"{number(factor)}*{operand}"


def _operand(text: str) -> str:
    return text if _ONE_OPERAND.fullmatch(text) else f"({text})"
