"""Names that come out of files: how they are shown, and which of them may name a file."""

from __future__ import annotations

_SHOWN = 200


def quoted(name: str) -> str:
    """``name`` in double quotes, safe to print: one line, no terminal control, at most about 200 characters.

    Everything that is not printable (C0, C1, DEL, bidirectional marks, line separators, lone surrogates) is
    written as an escape, so two different names never look the same by an invisible character.

    Example: ``quoted("a\\x1b[2J")`` is ``"a\\x1b[2J"`` with the escape spelled out.
    """
    cut = name if len(name) <= _SHOWN else name[: _SHOWN - 1]
    shown = "".join(
        character
        if character.isprintable() and character not in '"\\'
        else f"\\{character}"
        if character in '"\\'
        else character.encode("unicode_escape").decode("ascii")
        for character in cut
    )
    rest = "" if cut is name else f"… ({len(name)} characters)"
    return f'"{shown}"{rest}'
