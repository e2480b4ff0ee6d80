"""A MODEL argument: a name, a path, an address, or an expression, which is told from those by the rules of merges."""

from __future__ import annotations

import ast
import os
import re

from mergetool import models
from mergetool.checkpoint import paths
from mergetool.errors import ExpressionError
from mergetool.recipe.expression import Expression, parse
from mergetool.recipe.quotes import one_line, syntax_tree

_SPACED = re.compile(r"[*]|\s[+]\s")
_MINUS = re.compile(r"\s-\s")


def expression_of(text: str) -> Expression | None:
    """The merge that a MODEL argument is; None for a name, a path or an address, whether it leads anywhere or not.

    What exists under the text as it stands is that. Raises ExpressionError for a text that can only be meant as a merge and is none.
    """
    known = [entry.name for entry in models.listing()]
    if text in known or "\0" in text or _is_there(text):
        return None
    try:
        tree = syntax_tree(one_line(text).strip()).body
    except (ExpressionError, SyntaxError, ValueError, MemoryError, RecursionError):
        return parse(text, known) if _SPACED.search(text) else None  # which says what is wrong, or how it was meant
    is_name = isinstance(tree, ast.Name | ast.Attribute | ast.Constant)  # in quotes or not
    return None if is_name or not is_meant(text) else parse(text, known)


def _is_there(text: str) -> bool:
    typed = paths.typed(text)
    is_address = "://" in typed and not set(typed) & set("'\"")  # in an expression it would be in quotes
    return is_address or os.path.lexists(text) or os.path.lexists(typed)


def is_meant(text: str) -> bool:
    """Whether what can be read as operations is one, and not the path of nothing: ``z-imag``, ``old - model (1).safetensors``."""
    if _SPACED.search(text) or "'" in text or '"' in text:
        return True
    is_file = text.strip().lower().endswith(models.FILE_SUFFIXES)
    is_path = is_file or "/" in text
    return ("(" in text and not is_file) or (not is_path and bool("+" in text or _MINUS.search(text)))


def anchor_of(text: str) -> str:
    """The model whose folder stands for a MODEL argument's: itself, of an expression the first that it may be a change of."""
    expression = expression_of(text)
    return text if expression is None else anchor_of(expression.anchor)
