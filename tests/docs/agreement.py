"""When what a command prints is what the page shows.

The one rule: words must be equal, and numbers nearly so. A number that measures time, speed or memory (``0.6 s``, ``41 MB/s``, ``memory 249 MB``) may be any number; every other
may be off by one in its last digit or by one in a hundred, since processors round differently. How many blanks part two words does not count, since numbers of other
lengths move what follows them. Digits inside a word (a fingerprint, ``layers.10``) are part of the word.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"(?<![\w./-])-?\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w-]|\.\d)")
_ANY = re.compile(
    r"(?:(?<=memory )|(?<=memory at most ))\d[\d.]*(?= [kMG]?B\b)"
    r"|(?<![\w.])\d[\d.]*(?= (?:ms|s|min|h|[kMG]?B/s)(?![\w/]))"
)


def disagreement(shown: Sequence[str], printed: Sequence[str]) -> str:
    """How ``printed`` differs from ``shown`` by the rule above, as a diff; empty where they agree."""
    if len(shown) == len(printed) and all(map(_agree, shown, printed)):
        return ""
    alike = [before if _agree(before, line) else line for before, line in _pairs(shown, printed)]
    return "\n".join(difflib.unified_diff(shown, alike, "the page", "the program", lineterm=""))


def merged(shown: Sequence[str], printed: Sequence[str]) -> tuple[str, ...]:
    """What a renewed page shows: ``printed``, and of lines that agree with what it showed, those."""
    return tuple(before if _agree(before, line) else line for before, line in _pairs(shown, printed))


def _pairs(shown: Sequence[str], printed: Sequence[str]) -> list[tuple[str, str]]:
    """Each printed line with the shown line in its place, counted within stretches that are otherwise equal."""
    keys = [[_skeleton(line) for line in lines] for lines in (shown, printed)]
    found = dict.fromkeys(range(len(printed)), "")
    for match in difflib.SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        found.update({match.b + at: shown[match.a + at] for at in range(match.size)})
    return [(found[number], line) for number, line in enumerate(printed)]


def _agree(shown: str, printed: str) -> bool:
    if _skeleton(shown) != _skeleton(printed):
        return False
    return all(map(_near, _numbers(shown), _numbers(printed)))


def _skeleton(line: str) -> str:
    return " ".join(_NUMBER.sub("#", _ANY.sub("*", line)).split())


def _numbers(line: str) -> list[str]:
    return _NUMBER.findall(_ANY.sub("*", line))


def _near(shown: str, printed: str) -> bool:
    unit = max(_unit(shown), _unit(printed))
    a, b = float(shown), float(printed)
    return abs(a - b) <= max(1.001 * unit, 0.01 * max(abs(a), abs(b)))


def _unit(number: str) -> float:
    mantissa, _, exponent = number.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
