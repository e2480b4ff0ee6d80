"""Quotation marks in expressions. In quotes a name is what stands there: no character but the closing mark has a meaning.

A backslash is a backslash, so that a Windows path is one, at its end too: ``'C:\\models\\lora\\'``. A mark that belongs to the name is
written twice, ``'Bob''s mix'``, or the other marks are taken, ``"Bob's mix"``. The marks that word processors put in their place close
as they open.

Names are put in again after Python's parser has run: it gets a text of the same bytes, with placeholders for names.
"""

from __future__ import annotations

import ast
import keyword
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.paths import QUOTES
from mergetool.errors import ExpressionError

_BARE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


def quote(name: str) -> str:
    """Write a model name for an expression: bare where that reads back the same, else in quotes."""
    if _BARE_NAME.fullmatch(name) and not any(keyword.iskeyword(part) for part in name.split(".")):
        return name
    return in_quotes(name)


def in_quotes(name: str) -> str:
    """``name`` in quotation marks, as `syntax_tree` reads it back."""
    mark = '"' if "'" in name and '"' not in name else "'"
    return f"{mark}{name.replace(mark, mark * 2)}{mark}"


@dataclass(frozen=True, slots=True)
class _Quoted:
    """A name in quotes, at [start, end) of the text."""

    start: int
    end: int
    name: str


def one_line(text: str) -> str:
    """``text`` with every white space outside of quotes as a blank, character for character. Raises ExpressionError as `syntax_tree` does."""
    pieces, at = [], 0
    for quotation in _quoted(text):
        pieces += [re.sub(r"\s", " ", text[at : quotation.start]), text[quotation.start : quotation.end]]
        at = quotation.end
    return "".join([*pieces, re.sub(r"\s", " ", text[at:])])


def syntax_tree(text: str) -> ast.Expression:
    """Parse an expression by Python's grammar. Texts in quotes are names.

    Places in the tree are those of ``text`` in UTF-8. Raises ExpressionError for quotes that do not close or stand side by side, and what
    `ast.parse` raises.
    """
    pieces, names, at, place = [], {}, 0, 0
    for quotation in _quoted(text):
        before = text[at : quotation.start]
        size = len(text[quotation.start : quotation.end].encode("utf-8", "surrogatepass"))
        place += len(before.encode("utf-8", "surrogatepass")) + size
        pieces += [before, "'" + "_" * (size - 2) + "'"]
        names[place] = (place - size, quotation.name)
        at = quotation.end
    with warnings.catch_warnings():  # "1if" warns on stderr before it is refused
        warnings.simplefilter("ignore")
        tree = ast.parse("".join([*pieces, text[at:]]), mode="eval")
    for node in ast.walk(tree):
        if (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)) or isinstance(node, ast.JoinedStr):
            start, name = names.get(node.end_col_offset or 0, (-1, ""))
            if isinstance(node, ast.JoinedStr) or start != node.col_offset:
                raise ExpressionError(
                    f"column {node.col_offset + 1}: there is more than one name in quotes side by side, or a letter before a quote; "
                    "put + or - between two models, and write a quote that belongs to a name twice."
                )
            node.value = name
    return tree


def _quoted(text: str) -> list[_Quoted]:
    """Every name in quotes, in its order."""
    quotations, at = [], 0
    while at < len(text):
        closing = QUOTES.get(text[at])
        if closing is None:
            at += 1
            continue
        start, name, at = at, "", at + 1
        while True:
            end = text.find(closing, at)
            if end < 0:
                raise ExpressionError(
                    f"column {start + 1}: the quote before {quoted(text[start + 1 : start + 41])} is not closed; "
                    f"put {closing} behind the name."
                )
            name += text[at:end]
            at = end + 1
            if closing != text[start] or text[at : at + 1] != closing:
                break
            name += closing  # written twice
            at += 1
        quotations.append(_Quoted(start, at, name))
    return quotations


def with_loras(model: str, loras: Sequence[tuple[str, Fraction]]) -> str:
    """The expression that adds ``loras``, paths with their strengths, to ``model``."""
    terms = [quote(model)]
    for path, strength in loras:
        terms.append(f"{'-' if strength < 0 else '+'} {abs(strength)} * lora({in_quotes(path)})")
    return " ".join(terms)
