"""Regular expressions whose worst case is bounded, for patterns that come from a recipe or a file's metadata.

Python's ``re`` backtracks: ``(a+)+x`` takes 2**n steps on n letters, and nothing can interrupt it. Here every
position a prefix of the pattern can end at is held at once, as one bit of an integer (Thompson, "Regular
expression search algorithm", CACM 1968), so a match takes at most pattern length x name length**3 steps.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from re import _constants as sre  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from mergetool.checkpoint.names import quoted
from mergetool.errors import PatternError

MAX_NESTED_REPEATS = 3
MAX_NESTED_GROUPS = 50  # keeps the recursion below far from Python's limit of 1000 frames


class Regex:
    """A parsed regular expression: literals, classes, groups, ``|``, ``^ $`` and repeats in Python's syntax.

    Back-references, look-around, atomic groups and inline flags are refused, since they cannot be matched in
    bounded time. Raises PatternError for those, for a malformed expression, and for one nested too deep.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # "possible nested set": such a pattern may change its meaning
                self._tree = _parser.parse(text)
        except (re.error, OverflowError, RecursionError, Warning) as problem:
            raise PatternError(
                f"{quoted('re:' + text)} is not a regular expression: {problem}; see Python's re."
            ) from None
        if self._tree.state.flags & ~int(re.UNICODE):
            raise self._unsupported("an inline flag")
        self._check(self._tree, repeats=0, groups=0)

    def fullmatch(self, name: str) -> bool:
        """True when the expression matches the whole of ``name``."""
        return bool(_advance(self._tree, 1, _Subject(name)) >> len(name))

    def _check(self, tree: Any, *, repeats: int, groups: int) -> None:
        if repeats > MAX_NESTED_REPEATS or groups > MAX_NESTED_GROUPS:
            raise self._unsupported(
                f"repeats nested more than {MAX_NESTED_REPEATS} deep or groups more than {MAX_NESTED_GROUPS}"
            )
        for op, value in tree:
            if op not in _STEPS or (op is sre.SUBPATTERN and (value[1] or value[2])):
                raise self._unsupported(str(op).lower().replace("_", " "))
            if op in (sre.MAX_REPEAT, sre.MIN_REPEAT):
                self._check(value[2], repeats=repeats + 1, groups=groups)
            elif op is sre.SUBPATTERN:
                self._check(value[3], repeats=repeats, groups=groups + 1)
            elif op is sre.BRANCH:
                for branch in value[1]:
                    self._check(branch, repeats=repeats, groups=groups)
            elif op is sre.AT and value not in (*_START, *_END):
                raise self._unsupported("a word boundary")

    def _unsupported(self, what: str) -> PatternError:
        return PatternError(
            f"{quoted('re:' + self.text)} uses {what}, which mergetool does not support; write it without."
        )


class _Subject:
    """A name as one bit mask for each distinct character: bit i is set where the name has it at i."""

    def __init__(self, name: str) -> None:
        self.end = 1 << len(name)
        self.last_line_end = self.end >> 1 if name.endswith("\n") else self.end  # "$" also stands before a last \n
        self.masks: dict[str, int] = {}
        for i, character in enumerate(name):
            self.masks[character] = self.masks.get(character, 0) | 1 << i

    def where(self, wanted: Callable[[str], bool]) -> int:
        """The positions whose character is wanted."""
        positions = 0
        for character, mask in self.masks.items():
            if wanted(character):
                positions |= mask
        return positions


# Each step takes the set of positions reached so far (bit i: i characters consumed) to the next one.


def _advance(tree: Any, at: int, subject: _Subject) -> int:
    for op, value in tree:
        if not at:
            return 0
        at = _STEPS[op](value, at, subject)
    return at


def _literal(code: int, at: int, subject: _Subject) -> int:
    return (at & subject.masks.get(chr(code), 0)) << 1


def _not_literal(code: int, at: int, subject: _Subject) -> int:
    return (at & subject.where(lambda character: character != chr(code))) << 1


def _any(_: None, at: int, subject: _Subject) -> int:
    return (at & subject.where(lambda character: character != "\n")) << 1


def _class(items: list[tuple[Any, Any]], at: int, subject: _Subject) -> int:
    return (at & subject.where(lambda character: _in_class(items, character))) << 1


def _in_class(items: list[tuple[Any, Any]], character: str) -> bool:
    negated = items[0][0] is sre.NEGATE
    return negated != any(_CLASS_ITEMS[op](value, character) for op, value in items)


def _group(value: tuple[Any, int, int, Any], at: int, subject: _Subject) -> int:
    return _advance(value[3], at, subject)


def _branch(value: tuple[None, list[Any]], at: int, subject: _Subject) -> int:
    reached = 0
    for branch in value[1]:
        reached |= _advance(branch, at, subject)
    return reached


def _anchor(where: Any, at: int, subject: _Subject) -> int:
    if where in _START:
        return at & 1
    return at & (subject.end | subject.last_line_end if where is sre.AT_END else subject.end)


def _repeat(value: tuple[int, int, Any], at: int, subject: _Subject) -> int:
    least, most, body = value
    for _ in range(least):
        before, at = at, _advance(body, at, subject)
        if at == before:  # positions never move back, so what one round leaves alone every later one does
            break
    reached = frontier = at
    rounds = least
    while frontier and rounds < most:
        frontier = _advance(body, frontier, subject) & ~reached
        reached |= frontier
        rounds += 1
    return reached


_START = (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING)
_END = (sre.AT_END, sre.AT_END_STRING)
_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda character: not character.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda character: not character.isspace(),
    sre.CATEGORY_WORD: lambda character: character.isalnum() or character == "_",
    sre.CATEGORY_NOT_WORD: lambda character: not (character.isalnum() or character == "_"),
}
_CLASS_ITEMS: dict[Any, Callable[[Any, str], bool]] = {
    sre.NEGATE: lambda _, character: False,
    sre.LITERAL: lambda code, character: ord(character) == code,
    sre.RANGE: lambda codes, character: codes[0] <= ord(character) <= codes[1],
    sre.CATEGORY: lambda category, character: _CATEGORIES[category](character),
}
_STEPS: dict[Any, Callable[[Any, int, _Subject], int]] = {
    sre.LITERAL: _literal,
    sre.NOT_LITERAL: _not_literal,
    sre.ANY: _any,
    sre.IN: _class,
    sre.SUBPATTERN: _group,
    sre.BRANCH: _branch,
    sre.AT: _anchor,
    sre.MAX_REPEAT: _repeat,
    sre.MIN_REPEAT: _repeat,
}
