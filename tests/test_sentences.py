"""Sentences of the library name options, in backquotes; only the command line knows how those are typed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mergetool

PACKAGE = Path(mergetool.__file__).parent

# Rooms with sentences that still name flags; a room goes from here with its last one.
NOT_YET = ("lab",)

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


def flags() -> dict[str, list[str]]:
    """The places with flags, by room, outside the command line."""
    found: dict[str, list[str]] = {}
    for module in sorted(PACKAGE.rglob("*.py")):
        place = module.relative_to(PACKAGE)
        if place.parts[0] != "cli":
            lines = [f"{place}:{line}: {text.strip()[:100]}" for line, text in texts(module) if FLAG.search(text)]
            if lines:
                found.setdefault(place.parts[0], []).extend(lines)
    return found


def test_no_sentence_of_the_library_names_a_flag_of_the_command_line() -> None:
    found = [line for room, lines in flags().items() if room not in NOT_YET for line in lines]
    assert not found, "name the option in backquotes, as in `overwrite` or `device=cpu`:\n" + "\n".join(found)
