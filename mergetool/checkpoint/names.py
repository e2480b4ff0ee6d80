"""Names that come out of files: how they are shown, and which of them may name a file."""

from __future__ import annotations

import re
import unicodedata

_SHOWN = 200
_LONGEST_FILE_NAME = 255  # bytes on ext4, XFS, APFS; UTF-16 units on NTFS

# What Windows opens as a device whatever the extension, also with blanks before it: "con .safetensors".
_DEVICE = re.compile(r"(?:con|prn|aux|nul|conin\$|conout\$|clock\$|com[0-9¹²³]|lpt[0-9¹²³])\s*(?:\.|$)", re.IGNORECASE)


# A colon is no error of Windows': what stands behind it becomes a hidden stream of the file before it.
_FORBIDDEN = frozenset('/\\:*?"<>|')


def quoted(name: str) -> str:
    """``name`` in double quotes, safe to print: one line without terminal controls.

    It has about 200 characters at most.

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


def folded(name: str) -> str:
    """Fold a name so that names alike on some system become equal.

    Such systems ignore case, and how accents are composed.
    """
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def same_name(one: str, other: str) -> bool:
    """Whether two names are one file on some system."""
    return folded(one) == folded(other)


def why_not_plain(name: str, suffix: str) -> str | None:
    """Say why ``name`` may not name a file inside a folder, or None.

    A plain name ends in ``suffix`` and is one component under POSIX *and* Windows rules, wherever this runs: a
    model made to be harmless here must not lead out of its folder there.

    Example: ``why_not_plain("../x.safetensors", ".safetensors")`` is ``it has the character "/"``.
    """
    if not name.endswith(suffix) or name == suffix:
        return f"it is not a name ending in {suffix}"
    if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_FILE_NAME:
        return f"it is longer than {_LONGEST_FILE_NAME} bytes"
    for character in name:
        if character == "/" or not character.isprintable():
            return f"it has the character {quoted(character)}"
    if name.startswith(" "):
        return "it starts with a blank"
    return why_not_on_windows(name)


def why_not_on_windows(name: str) -> str | None:
    """Say why no file or folder of Windows can have this ``name``, or None. A drive and folders before it do not count.

    Example: ``why_not_on_windows("con.safetensors")`` is ``Windows takes it for a device``.
    """
    for character in name:
        if character in _FORBIDDEN or character < " ":
            return f"it has the character {quoted(character)}"
    if name.endswith((".", " ")):
        return "it ends in a dot or a blank, which Windows drops"
    if _DEVICE.match(name):
        return "Windows takes it for a device"
    return None
