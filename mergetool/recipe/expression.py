"""Merge expressions: text to a typed affine graph, without opening a file.

``alkahest + 20 * (artshoot - 'z-image')`` is parsed with Python's own expression grammar, of which only names,
dotted names, quoted names, numbers, ``+ - * /``, parentheses, ``lora("file")`` and calls of registered merge methods are let
through; nothing is ever evaluated.

Every value has a *degree*: a model is 1, ``lora("file")`` is 0, a number times it scales it, ``+`` and ``-`` add it, a method
says its own (see ``calls.py``). A result of degree 1
is a model, of degree 0 a difference of models; a merge must have degree 1. Degrees are exact fractions, so
``a/3 + b/3 + c/3`` is a model and ``0.7*a + 0.2*b`` is refused.

The graph it becomes is in the normal form of ``graph.py``.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite

from mergetool.errors import ExpressionError
from mergetool.options.multipliers import number
from mergetool.recipe.calls import read_call
from mergetool.recipe.graph import (
    Call,
    Lora,
    Model,
    Sum,
    Term,
    add,
    canonical,
    normal,
    own_factors,
    render,
    scale,
)
from mergetool.recipe.hints import mended
from mergetool.recipe.quotes import one_line, quote, syntax_tree

MAX_TEXT = 100_000
MAX_NODES = 10_000
MAX_DEPTH = 200
# Beyond float32's range a multiplier turns every weight into infinity, and below it into zero.
LARGEST_FACTOR = Fraction(2) ** 127
SMALLEST_FACTOR = Fraction(1, 2**126)


@dataclass(frozen=True, slots=True)
class Expression:
    """A merge expression of degree 1 in normal form.

    ``text`` is what the user typed, ``graph`` its normal form in the order of the text, ``arithmetic`` what is computed, the same until
    `arranged`. ``anchors`` are the models that may be the *anchor*, which gives the output its names, dtypes and kept tensors: those
    whose own factor, outside differences, is 1; else those whose own factor is positive. The first of them is it until `anchored`.
    """

    text: str
    graph: Sum
    arithmetic: Sum
    anchors: tuple[str, ...]
    records_anchor: bool = True

    @property
    def loras(self) -> tuple[str, ...]:
        """Every LoRA of the expression."""
        return self.graph.loras()

    @property
    def anchor(self) -> str:
        """The model that the expression changes."""
        return self.anchors[0]

    @property
    def models(self) -> tuple[str, ...]:
        """Every model of the expression, the anchor in front."""
        return (self.anchor, *(name for name in self.graph.models() if name != self.anchor))

    def anchored(self, name: str) -> Expression:
        """The expression with ``name``, one of ``anchors``, as its anchor."""
        return replace(self, anchors=(name,))

    def arranged(self, contents: Mapping[str, str]) -> Expression:
        """The expression with its arithmetic in the order of its inputs' fingerprints.

        Those of models and of LoRAs count.
        """
        return replace(self, arithmetic=canonical(self.graph, contents))

    def as_written(self, first: str) -> Expression:
        """The expression of an output that records no anchor: ``first`` of its inputs is it. The text's order counts.

        ``first`` is one of its inputs.
        """
        return replace(self, anchors=(first,), arithmetic=self.graph, records_anchor=False)

    def render(self, names: Mapping[str, str]) -> str:
        """Write the expression as text, each model as ``names`` says, or as itself."""
        return render(self.arithmetic, names)


def parse(text: str, known: Collection[str] = ()) -> Expression:
    """Read ``text`` as a merge. ``known`` are the registered names, for the advice to quote ``z-image``.

    Example: ``parse("a + 20*(b - c)").graph`` prints as ``a + 20*(b - c)``.

    Raises ExpressionError, with the column where it helps, for anything but an affine combination of models of
    degree 1: unknown syntax, products of models, sums of whole models, zero or non-finite factors.
    """
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"the expression has {len(text)} characters; the limit is {MAX_TEXT}.")
    source = one_line(text).strip()  # one line, so that columns and messages are too
    if not source:
        raise ExpressionError('the expression is empty; write for example "a + 20 * (b - c)".')
    try:
        return _parsed(source, known)
    except ExpressionError:
        better = mended(source, lambda candidate: _is_merge(candidate, known))
        if better is None:
            raise
        raise ExpressionError(f'"{source}" cannot be read: {better[1]}; write "{better[0]}".') from None


def _is_merge(source: str, known: Collection[str]) -> bool:
    try:
        return bool(_parsed(source, known))
    except ExpressionError:
        return False


def _parsed(source: str, known: Collection[str]) -> Expression:
    tree = _syntax_tree(source)
    _check_limits(tree, source)
    read = _read(tree.body, source)
    if isinstance(read, Fraction):
        raise ExpressionError(f'"{source}" is a number, not a model.')
    _check_quoting(tree, source, known)
    value = normal(read)
    if not value.terms:
        raise ExpressionError(f'"{source}" cancels to nothing.')
    _check_degree(value, source)
    _check_factors(value)
    both = set(value.models()) & set(value.loras())
    if both:
        raise ExpressionError(f'"{both.pop()}" is written as a model and as a LoRA; one file is one of the two.')
    return Expression(source, value, value, _anchors(value))


def _anchors(value: Sum) -> tuple[str, ...]:
    factors = own_factors(value)
    return tuple(name for name, factor in factors.items() if factor == 1) or tuple(
        name for name, factor in factors.items() if factor > 0
    )


def _check_quoting(tree: ast.Expression, source: str, known: Collection[str]) -> None:
    """``z-image`` without quotes reads as ``z`` minus ``image``: say so before the degree looks wrong."""
    for node in sorted(_value_nodes(tree.body), key=lambda node: (node.lineno, node.col_offset)):
        name = None if isinstance(node, ast.Constant) else _model_name(node)
        if name is None or name in known:
            continue
        for whole in sorted(known, key=len, reverse=True):
            if whole in source and name in re.split(r"[^A-Za-z0-9_.]+", whole):
                raise ExpressionError(
                    f'no model named "{name}". "{whole}" is a registered name: quote it, as in {whole!r}.'
                )


def _check_degree(value: Sum, source: str) -> None:
    degree = value.degree()
    if degree == 1:
        return
    shown = number(degree)
    if degree == 0:
        raise ExpressionError(
            f'"{source}" is a difference of models (degree 0), not a model; add it to one, as in '
            f'"model + {source if _is_product(source) else f"({source})"}", or take it as a LoRA with `mergetool diff`.'
        )
    if degree == 2 and len(value.terms) == 2 and all(isinstance(t.operand, Model) for t in value.terms):
        a, b = (quote(t.operand.name) for t in value.terms if isinstance(t.operand, Model))
        raise ExpressionError(
            f'"{source}" adds two whole models (degree 2); did you mean 0.5*{a} + 0.5*{b}, or {a} + ({b} - base)?{_lora_meant(value, degree)}'
        )
    raise ExpressionError(
        f'"{source}" has degree {shown}: the factors of its models add up to {shown}, and a merge needs 1; '
        f"add differences, as in a + m*(b - c), or divide by {shown}.{_lora_meant(value, degree)}"
    )


def _lora_meant(value: Sum, degree: Fraction) -> str:
    """A second sentence where the file with a factor too many could be a LoRA; else nothing."""
    for term in value.terms:
        if isinstance(term.operand, Model) and degree - term.factor == 1 and term.operand.name.endswith(".safetensors"):
            name = quote(term.operand.name)
            return f" If {name} is a LoRA, write lora({name})."
    return ""


def _is_product(source: str) -> bool:
    return not re.search(r"[+-]", re.sub(r"\([^()]*\)", "", source))


def _syntax_tree(source: str) -> ast.Expression:
    try:
        return syntax_tree(source)
    except SyntaxError as error:
        at = f" at column {error.offset}" if error.offset else ""
        raise ExpressionError(
            f'"{source}" cannot be read{at}: {error.msg}; names with other characters than letters, digits and _ '
            "must be quoted, as in 'z-image'."
        ) from None
    except (ValueError, MemoryError, RecursionError):
        raise ExpressionError("the expression cannot be read: it is nested too deeply or holds a NUL.") from None


def _check_limits(tree: ast.Expression, source: str) -> None:
    """Bound size and depth before anything recursive walks the tree."""
    nodes, stack = 0, [(tree.body, 1)]
    while stack:
        node, depth = stack.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise ExpressionError(
                f"the expression is too large: at most {MAX_NODES} terms and {MAX_DEPTH} levels are read."
            )
        children = [child.value if isinstance(child, ast.keyword) else child for child in ast.iter_child_nodes(node)]
        stack.extend((child, depth + 1) for child in children if isinstance(child, ast.expr))


def _value_nodes(node: ast.expr) -> Iterator[ast.expr]:
    """The nodes in places of models, parameters of methods apart."""
    stack: list[ast.expr] = [node]
    while stack:
        current = stack.pop()
        if isinstance(current, ast.BinOp):
            stack += [current.left, current.right]
        elif isinstance(current, ast.UnaryOp):
            stack.append(current.operand)
        elif isinstance(current, ast.Call) and not _is_lora(current):
            stack += [*current.args, *(keyword.value for keyword in current.keywords if keyword.arg == "base")]
        else:
            yield current


def _is_lora(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Name) and node.func.id == "lora"


def _model_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if isinstance(node, ast.Name):
        return ".".join([node.id, *reversed(parts)])
    return None


def _read(node: ast.expr, source: str) -> Fraction | Sum:
    if isinstance(node, ast.BinOp):
        return _binary(node, source)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _read(node.operand, source)
        return value if isinstance(node.op, ast.UAdd) else scale(Fraction(-1), value)
    name = _model_name(node)
    if name is not None:
        _check_name(name, node)
        return Sum((Term(Fraction(1), Model(name)),))
    if isinstance(node, ast.Constant):
        return _constant(node, source)
    if isinstance(node, ast.Call) and _is_lora(node):
        return _lora(node, source)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return read_call(node, node.func.id, lambda inner: _read(inner, source))
    if isinstance(node, ast.Call):
        raise ExpressionError(f'column {node.col_offset + 1}: "{_snippet(node.func, source)}" is not a merge method.')
    raise ExpressionError(
        f'column {node.col_offset + 1}: "{_snippet(node, source)}" is not part of a merge expression; it may hold '
        'model names, lora("file"), numbers, + - * /, parentheses and merge methods.'
    )


def _lora(node: ast.Call, source: str) -> Sum:
    name = _model_name(node.args[0]) if len(node.args) == 1 and not node.keywords else None
    if name is None:
        raise ExpressionError(
            f'column {node.col_offset + 1}: "{_snippet(node, source)}" names no LoRA; write lora("file.safetensors").'
        )
    _check_name(name, node.args[0])
    return Sum((Term(Fraction(1), Lora(name)),))


def _check_name(name: str, node: ast.expr) -> None:
    if not name.strip() or "\0" in name:
        raise ExpressionError(f"column {node.col_offset + 1}: a model name is empty or holds a NUL.")


def _constant(node: ast.Constant, source: str) -> Fraction:
    value = node.value
    text = _snippet(node, source)
    finite = (isinstance(value, float) and isfinite(value)) or (isinstance(value, int) and value.bit_length() < 1000)
    if isinstance(value, bool) or not isinstance(value, int | float) or not finite:
        raise ExpressionError(f'column {node.col_offset + 1}: "{text}" is not a finite number.')
    if value == 0:
        return Fraction(0)  # also 1e-999999999, whose exact fraction would fill the memory
    try:
        # The digits as typed, not the double they round to: 0.7 + 0.3 is exactly 1.
        whole = ast.get_source_segment(source, node) or text
        return Fraction(whole.replace("_", ""))
    except ValueError:
        return Fraction(value)


def _binary(node: ast.BinOp, source: str) -> Fraction | Sum:
    left, right = _read(node.left, source), _read(node.right, source)
    where = f'column {node.col_offset + 1}: "{_snippet(node, source)}"'
    match node.op:
        case ast.Add() | ast.Sub():
            sign = Fraction(1 if isinstance(node.op, ast.Add) else -1)
            if isinstance(left, Fraction) and isinstance(right, Fraction):
                return left + sign * right
            if isinstance(left, Fraction) or isinstance(right, Fraction):
                raise ExpressionError(f"{where} adds a number to a model; numbers only multiply.")
            signed = scale(sign, right)
            assert isinstance(signed, Sum)
            return add(add(Sum(()), left) if left.degree() == 0 and not _is_chain(node) else left, signed)
        case ast.Mult():
            if isinstance(left, Fraction):
                return scale(left, right)
            if isinstance(right, Fraction):
                return scale(right, left)
            raise ExpressionError(f"{where} multiplies two models; only numbers multiply models.")
        case ast.Div():
            if not isinstance(right, Fraction):
                raise ExpressionError(f"{where} divides by a model; only numbers divide models.")
            if right == 0:
                raise ExpressionError(f"{where} divides by zero.")
            return scale(1 / right, left)
        case _:
            raise ExpressionError(f"{where} uses an operator that merges do not have; there are + - * /.")


def _is_chain(node: ast.BinOp) -> bool:
    """Whether the left side goes on without parentheses: "(a - b) + c" begins before its "a - b" does, "a - b + c" with it."""
    left = node.left
    is_sum = isinstance(left, ast.BinOp) and isinstance(left.op, ast.Add | ast.Sub)
    return is_sum and left.col_offset == node.col_offset


def _snippet(node: ast.AST, source: str) -> str:
    text = ast.get_source_segment(source, node) or source
    return text if len(text) <= 60 else text[:57] + "..."


def _check_factors(value: Sum) -> None:
    for term in value.terms:
        if not SMALLEST_FACTOR <= abs(term.factor) <= LARGEST_FACTOR:
            raise ExpressionError(
                f"the factor {float(term.factor):.3g} is outside the range of float32 "
                f"({float(SMALLEST_FACTOR):.1e} to {float(LARGEST_FACTOR):.1e})."
            )
        inner = term.operand.arguments if isinstance(term.operand, Call) else [term.operand]
        for operand in inner:
            if isinstance(operand, Sum):
                _check_factors(operand)
