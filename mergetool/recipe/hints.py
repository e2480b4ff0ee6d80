"""Recognise slips in expressions, and suggest the right text.

Slips are a path without quotes, a decimal comma, a per cent sign, a factor without ``*``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

from mergetool.recipe.quotes import in_quotes, quote

_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_HELD = "\ue000"  # stands for a name in quotes, which is left as it is
_NUMBER = r"(?<![\w.])(\d+(?:[.,]\d+)?(?:[eE][+-]?\d+)?)"
_SHARE = r"(?<![\w.])(\d{1,9}(?:[.,]\d{1,15})?)\s*%\s*(?:of\s+)?(\S)"  # short enough to be divided exactly
_OPERATORS = re.compile(r"([()+*,]|\s-\s)")
_PATH = re.compile(rf"(\s*-?\s*(?:{_NUMBER}\s*%?\s+)?)(\S.*\.(?:safetensors|sft|gguf|ckpt|pt))(\s*)", re.IGNORECASE)


def mended(text: str, reads: Callable[[str], bool]) -> tuple[str, str] | None:
    """Mend ``text`` to one that ``reads``, and say what was wrong; else None."""
    if _HELD in text:
        return None
    names = _QUOTED.findall(text)
    held = _QUOTED.sub(_HELD, text)
    reasons = []
    for reason, mend in _MENDINGS:
        better = mend(held)
        if better == held:
            continue
        held = better
        reasons.append(reason)
        candidate = _with_names(held, names)
        if reads(candidate):
            return candidate, " and ".join(reasons)
    return None


def _with_names(held: str, names: list[str]) -> str:
    given = iter(names)
    return re.sub(_HELD, lambda _: next(given), held)


def _paths(text: str) -> str:
    def quoted(operand: str) -> str:
        match = _PATH.fullmatch(operand)
        if not match or _HELD in operand:
            return operand
        before, _, path, after = match.groups()
        return operand if quote(path) == path else f"{before}{in_quotes(path)}{after}"

    return "".join(map(quoted, _OPERATORS.split(text)))


def _points(text: str) -> str:
    return re.sub(r"(?<![\w.,])(\d+),(\d+)(?![\w.,])", r"\1.\2", text)


def _fractions(text: str) -> str:
    def share(match: re.Match[str]) -> str:
        return f"{Decimal(match[1].replace(',', '.')) / 100:f}{'' if match[2] == '*' else '*'}{match[2]}"

    return re.sub(_SHARE, share, text)


def _products(text: str) -> str:
    return re.sub(rf"{_NUMBER}\s*(?:[×·]|x(?=[\s(]))?\s*(?=[A-Za-z_({_HELD}'\"])", r"\1*", text)


_MENDINGS = (
    ("a path is put in quotes", _paths),
    ("decimals follow a point", _points),
    ("30% is 0.3", _fractions),
    ("* stands between a factor and what it multiplies", _products),
)
