"""Sentences of the library name options, in backquotes; only the command line knows how those are typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mergetool

PACKAGE = Path(mergetool.__file__).parent

FLAG = re.compile(r"(?<![\w-])--[a-z]")


def texts(module: Path) -> Iterator[tuple[int, str]]:
    """Every text in a module, and the line it begins in; of one with values in it the pieces between them."""
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            for piece, following in zip(node.values, [*node.values[1:], None], strict=True):
                if isinstance(piece, ast.Constant) and isinstance(following, ast.FormattedValue):
                    yield node.lineno, f"{piece.value}x"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_no_sentence_of_the_library_names_a_flag_of_the_command_line() -> None:
    modules = {module.relative_to(PACKAGE): module for module in sorted(PACKAGE.rglob("*.py"))}
    library = {
        place: module
        for place, module in modules.items()
        # packages.py writes commands of pip, whose options are pip's own.
        if place.parts[0] != "cli" and place.name not in ("__main__.py", "packages.py")
    }
    found = [
        f"{place}:{line}: {text.strip()[:100]}"
        for place, module in library.items()
        for line, text in texts(module)
        if FLAG.search(text)
    ]
    assert not found, "name the option in backquotes, as in `overwrite` or `device=cpu`:\n" + "\n".join(found)
