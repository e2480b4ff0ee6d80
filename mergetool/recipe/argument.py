"""A MODEL argument: a name, a path, an address, or an expression.

The rules of merges tell an expression from the others.
"""

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
    """Read a MODEL argument as a merge. None for a name, path or address, whether it exists or not.

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
    """Whether a text with operators is a merge, not a mistyped path.

    Examples of paths: ``z-imag``, ``old - model (1).safetensors``.
    """
    if _SPACED.search(text) or "'" in text or '"' in text:
        return True
    is_file = text.strip().lower().endswith(models.FILE_SUFFIXES)
    is_path = is_file or "/" in text
    return ("(" in text and not is_file) or (not is_path and bool("+" in text or _MINUS.search(text)))


def anchor_of(text: str) -> str:
    """The model whose folder stands for a MODEL argument's.

    That is the model itself, or an expression's first possible anchor.
    """
    expression = expression_of(text)
    return text if expression is None else anchor_of(expression.anchor)
