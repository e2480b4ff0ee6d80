"""Resolve the names in a recipe's expression, and trace errors back to the file.

A name is a variable, a model of the recipe, an earlier output, or ``lab.NAME``. Variables are put in as the numbers that were typed
before the expression is read, so ``0.1*m`` is exact; the rest of the text stays as it is, so that a column in an error of
`expression.parse` leads back to a place in the file.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from mergetool.checkpoint.names import quoted
from mergetool.errors import ExpressionError, RecipeError
from mergetool.recipe.document import Node
from mergetool.recipe.expression import Expression, parse
from mergetool.recipe.quotes import one_line, quote, syntax_tree
from mergetool.recipe.validation import nearest

_COLUMN = re.compile(r"^column (\d+): | at column (\d+)(?=: )")


@dataclass(frozen=True, slots=True)
class Name:
    """A name in the text, at [start, end). ``is_word`` is false in quotes; ``is_setting`` for a method's ``keyword="text"``."""

    start: int
    end: int
    name: str
    is_word: bool
    is_setting: bool = False


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable's value: the number as it was typed, or a text."""

    text: str
    is_number: bool


def names_in(text: str) -> list[Name]:
    """List every name of an expression, in order. The list is empty for a broken expression, which `parse` reports."""
    try:
        source = one_line(text)
        begin = len(source) - len(source.lstrip())
        tree = syntax_tree(source[begin:])
    except (ExpressionError, SyntaxError, ValueError, MemoryError, RecursionError):
        return []
    raw = source[begin:].encode()

    def span(node: ast.expr) -> tuple[int, int]:
        ends = (node.col_offset, node.end_col_offset or 0)
        start, end = (begin + len(raw[:offset].decode()) for offset in ends)
        return start, end

    return sorted(_names_of(tree.body, span), key=lambda name: name.start)


def _names_of(root: ast.expr, span: Callable[[ast.expr], tuple[int, int]]) -> Iterator[Name]:
    stack: list[tuple[ast.AST, bool]] = [(root, False)]
    while stack:
        node, is_setting = stack.pop()
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name):
            continue  # no method is called like this, whatever its arguments
        if isinstance(node, ast.Call):
            stack += [(argument, False) for argument in node.args]
            stack += [(keyword.value, True) for keyword in node.keywords]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield Name(*span(node), node.value, False, is_setting)
        elif isinstance(node, ast.Name | ast.Attribute):
            parts: list[str] = []
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                parts.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield Name(*span(node), ".".join([inner.id, *reversed(parts)]), True)
        else:
            stack += [(child, is_setting) for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]


@dataclass(frozen=True, slots=True)
class Replaced:
    """A text in which names were replaced, and where its characters were before."""

    text: str
    starts: tuple[int, ...]  # of the pieces in the new text
    origins: tuple[int, ...]  # of the same pieces in the old one
    kept: tuple[bool, ...]  # whether a piece is the old text, so that columns go on in it

    def origin(self, index: int) -> int:
        """The index in the old text of character ``index`` of the new one."""
        piece = max(0, bisect_right(self.starts, index) - 1)
        return self.origins[piece] + (index - self.starts[piece] if self.kept[piece] else 0)


def replaced(text: str, by: Mapping[Name, str]) -> Replaced:
    """``text`` with each of these names written as the mapping says."""
    pieces: list[tuple[str, int, bool]] = []
    end = 0
    for name in sorted(by, key=lambda name: name.start):
        pieces += [(text[end : name.start], end, True), (by[name], name.start, False)]
        end = name.end
    pieces.append((text[end:], end, True))
    starts, length = [], 0
    for piece, _, _ in pieces:
        starts.append(length)
        length += len(piece)
    return Replaced(
        "".join(piece for piece, _, _ in pieces),
        tuple(starts),
        tuple(origin for _, origin, _ in pieces),
        tuple(kept for _, _, kept in pieces),
    )


def with_variables(node: Node, variables: Mapping[str, Variable]) -> Replaced:
    """Put every variable into an expression's text: numbers as typed, texts as models."""
    assert isinstance(node.value, str)
    by = {}
    for name in names_in(node.value):
        variable = variables.get(name.name) if name.is_word else None
        if variable is not None:
            number = f"({variable.text})" if variable.text[:1] in "+-" else variable.text
            by[name] = number if variable.is_number else quote(variable.text)
    return replaced(node.value, by)


def expression_of(
    node: Node, written: Replaced, known: Collection[str], later: Collection[str], variables: Collection[str]
) -> Expression:
    """The expression of a node whose ``variables`` are put in.

    Raises RecipeError at the place of the first name that is not ``known``, one of ``later``'s being an output that is not made yet, and
    for everything that `expression.parse` refuses.
    """
    for name in names_in(written.text):
        if name.name in known or name.name.startswith("lab.") or (name.is_setting and not name.is_word):
            continue
        raise _unknown(name, node, written, known, later, variables)
    try:
        return parse(written.text, known=known)
    except ExpressionError as error:
        raise located(error, node, written) from None


def located(error: ExpressionError, node: Node, written: Replaced) -> RecipeError:
    """The error of an expression at its place in the file."""
    sentence = str(error)
    match = _COLUMN.search(sentence)
    if match is None:
        return node.at.error(sentence)
    stripped = len(written.text) - len(written.text.lstrip())
    column = int(match[1] or match[2]) - 1 + stripped
    return node.place_of(written.origin(column)).error(_COLUMN.sub("", sentence, count=1))


def _unknown(
    name: Name,
    node: Node,
    written: Replaced,
    known: Collection[str],
    later: Collection[str],
    variables: Collection[str],
) -> RecipeError:
    at = node.place_of(written.origin(name.start))
    if name.name in later:
        return at.error(f"{quoted(name.name)} is not made before this output; put it further up in the file.")
    for whole in sorted(known, key=len, reverse=True):
        if name.is_word and whole in written.text and name.name in re.split(r"[^A-Za-z0-9_.]+", whole):
            return at.error(
                f"no model is named {quoted(name.name)}, but {quoted(whole)} is: quote it, as in {whole!r}."
            )
    return at.error(
        f"{quoted(name.name)} is no model, output or variable of this recipe{nearest(name.name, {*known, *variables})}"
    )
