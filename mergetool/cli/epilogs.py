"""Examples below a command's help, in lines that fit 80 columns."""

from __future__ import annotations

import re
import textwrap

WIDTH = 76
"""Columns that click leaves of 80 to a text below the options."""

_PARTS = re.compile(r'(?:--?[a-z][a-z0-9-]* (?!-))?(?:"[^"]*"|\S)+')
"""An option with its value, or a word."""

_ENTRY = re.compile(r"\s*\S+ {2,}(?=\S)")


def fitted(text: str, width: int = WIDTH) -> str:
    """Break long lines of ``text``. A command breaks before an option, with a backslash; other lines at a space."""
    return "\n".join(piece for line in text.split("\n") for piece in _pieces(line, width))


def _pieces(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    if line.startswith("  mergetool "):
        return _command(line, width)
    entry = _ENTRY.match(line)
    indent = " " * (entry.end() if entry else len(line) - len(line.lstrip()))
    return textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _command(line: str, width: int) -> list[str]:
    lines = [""]
    for part in _PARTS.findall(line):
        if len(lines[-1]) + len(part) + 5 > width and lines[-1]:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {part}"
    return [f" {lines[0]}", *lines[1:]]
