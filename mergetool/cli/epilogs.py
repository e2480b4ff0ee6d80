"""Examples below a command's help, in lines that fit 80 columns."""

from __future__ import annotations

import re
import textwrap

WIDTH = 76
"""What click leaves of 80 columns to a text below the options."""

_PARTS = re.compile(r'(?:--?[a-z][a-z-]* (?!-))?(?:"[^"]*"|\S)+')
"""An option with its value, or a word."""

_ENTRY = re.compile(r"\s*\S+ {2,}(?=\S)")


def fitted(text: str) -> str:
    """Break long lines of ``text``. A command breaks before an option, with a backslash; other lines at a space."""
    return "\n".join(piece for line in text.split("\n") for piece in _pieces(line))


def _pieces(line: str) -> list[str]:
    if len(line) <= WIDTH:
        return [line]
    if line.startswith("  mergetool "):
        return _command(line)
    entry = _ENTRY.match(line)
    indent = " " * (entry.end() if entry else len(line) - len(line.lstrip()))
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _command(line: str) -> list[str]:
    lines = [""]
    for part in _PARTS.findall(line):
        if len(lines[-1]) + len(part) + 3 > WIDTH and lines[-1]:
            lines[-1] += " \\"
            lines.append("     ")
        lines[-1] += f" {part}"
    return [f" {lines[0]}", *lines[1:]]
