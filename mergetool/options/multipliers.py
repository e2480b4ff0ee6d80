"""A multiplier for a group, as text and as an exact value.

A setting is ``PATTERN=NUMBER``, ``PATTERN=SHAPE(FIRST,LAST)``, a gradient over depth, or ``preset:NAME`` for some of those. Every number is exact
until it meets a tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from mergetool.errors import UsageError

PRESET = "preset:"
SHAPES = ("linear", "smooth", "bell")

_MAX_TEXT = 400  # characters of a number; what is exact may be long, and 10**400 costs nothing
_LIMIT = Fraction(10) ** 38  # float32 ends at 3.4e38
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}|/[0-9]+)?")
_GRADIENT = re.compile(r"(?P<shape>[A-Za-z]+)\s*\((?P<first>[^(),]*),(?P<last>[^(),]*)\)")


@dataclass(frozen=True, slots=True)
class Gradient:
    """A multiplier over depth: it runs along a stack's blocks from ``first`` to ``last``.

    Block number n of a stack whose selected blocks are numbered n0 to n1 lies at x = (n - n0) / (n1 - n0).

    ============  =======================================  ==========================
    ``linear``    first + (last - first) * x               a straight line
    ``smooth``    first + (last - first) * (3x² - 2x³)     smoothstep: level at both ends
    ``bell``      the same with x' = 1 - abs(2x - 1)       ``first`` at both ends, ``last`` in the middle
    ============  =======================================  ==========================

    Values are exact fractions. Example: ``Gradient("linear", Fraction(0), Fraction(1)).at(Fraction(1, 3))`` is 1/3.
    """

    shape: str
    first: Fraction
    last: Fraction

    def at(self, x: Fraction) -> Fraction:
        """The multiplier at depth ``x``, from 0 to 1."""
        if self.shape == "bell":
            x = 1 - abs(2 * x - 1)
        if self.shape != "linear":
            x = x * x * (3 - 2 * x)
        return self.first + (self.last - self.first) * x

    def __mul__(self, factor: Fraction) -> Gradient:
        return Gradient(self.shape, self.first * factor, self.last * factor)

    def __str__(self) -> str:
        return f"{self.shape}({number(self.first)},{number(self.last)})"


Multiplier = Fraction | Gradient
Setting = tuple[str, Multiplier]
"""A pattern, or ``preset:NAME``, and its multiplier; that of a preset scales the preset's own."""


def parse_setting(text: str) -> Setting:
    """Read ``GROUP=MULT``, ``GROUP=linear(0.2,1)``, ``preset:NAME`` or ``preset:NAME=MULT``.

    Example: ``layers=linear(0.2,1)`` gives ``("layers", Gradient("linear", Fraction(1, 5), Fraction(1)))``. Raises UsageError.
    """
    pattern, equals, value = (part.strip() for part in text.rpartition("="))
    if not equals and value.startswith(PRESET):
        pattern, value = value, "1"
    multiplier = _multiplier(value)
    if not pattern or multiplier is None or (pattern.startswith(PRESET) and isinstance(multiplier, Gradient)):
        raise UsageError(
            f'`multipliers` has "{text}", which is not GROUP=MULT with a finite number, as in refiner=0, nor GROUP=SHAPE(FIRST,LAST) with '
            f"{', '.join(SHAPES[:-1])} or {SHAPES[-1]}, as in layers=linear(0.2,1), nor {PRESET}NAME."
        )
    return pattern, multiplier


def setting_text(setting: Setting) -> str:
    """A setting as text that ``parse_setting`` reads back to it."""
    pattern, multiplier = setting
    return f"{pattern}={multiplier if isinstance(multiplier, Gradient) else number(multiplier)}"


def _multiplier(text: str) -> Multiplier | None:
    gradient = _GRADIENT.fullmatch(text)
    if gradient is None:
        return _number(text)
    first, last = _number(gradient["first"].strip()), _number(gradient["last"].strip())
    if gradient["shape"] not in SHAPES or first is None or last is None:
        return None
    return Gradient(gradient["shape"], first, last)


def _number(text: str) -> Fraction | None:
    """An exact number of ordinary size; None for anything else."""
    # The pattern keeps exponents short: Fraction("1e-999999999") would be a number of a billion digits.
    if len(text) > _MAX_TEXT or not _NUMBER.fullmatch(text):
        return None
    try:
        value = Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
    return value if abs(value) < _LIMIT else None


def number(value: Fraction) -> str:
    """An exact factor as text that reads back the same: decimal where finite, else ``p/q``."""
    if value.denominator == 1:
        return str(value.numerator)
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"
    digits = 0
    while (value * 10**digits).denominator != 1:
        digits += 1
    whole = str(abs((value * 10**digits).numerator)).rjust(digits + 1, "0")
    return f"{'-' if value < 0 else ''}{whole[:-digits]}.{whole[-digits:]}"
