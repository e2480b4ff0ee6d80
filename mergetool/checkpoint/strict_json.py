"""JSON as the safetensors library reads it: RFC 8259 to the letter. Python's own reader is laxer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from mergetool.checkpoint.names import quoted

Pairs = list[tuple[str, Any]]

_DIGITS = 300  # float64 ends at 1.8e308; longer literals serve only to make a reader slow
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\(u[dD][89a-fA-F])|\\.", re.DOTALL)


def loads(raw: bytes, *, build: Callable[[Pairs], Any] | None = None) -> Any:
    """Parse ``raw``; ``build`` makes objects from name-value pairs in file order.

    Without ``build`` objects become dicts. Refuses, with a ValueError whose text completes "the JSON has ...":
    bytes that are not UTF-8, a byte order mark, NaN and Infinity, numbers out of range, lone surrogates, nesting
    too deep for the interpreter, anything after the value and (without ``build``) a name given twice.
    Minus zero reads as the float -0.0, so that it never passes for an unsigned integer.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"a byte that is not UTF-8 at position {error.start}") from None
    if _SURROGATE.search(raw) and any(match[1] for match in _ESCAPE.finditer(text)):
        raise ValueError("half of a surrogate pair in a string")
    try:
        return json.loads(
            text,
            object_pairs_hook=build or _unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"a syntax error at character {error.pos}: {error.msg}") from None
    except RecursionError:
        raise ValueError("values nested too deeply") from None


def _unique(pairs: Pairs) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError(f"the name {quoted(first_repeated(pairs))} twice in one object")
    return members


def first_repeated(pairs: Pairs) -> str:
    """The first name that occurs a second time; ``pairs`` must have one."""
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no name is repeated")


def _integer(digits: str) -> int | float:
    if digits == "-0":
        return -0.0
    if len(digits) > _DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number out of range")
    return number


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word}, which is not a JSON value")
