"""Multipliers by group: what ``--set`` says, as text and resolved against a model.

A setting is ``PATTERN=NUMBER``, ``PATTERN=SHAPE(FIRST,LAST)``, a gradient over depth, or ``preset:NAME`` for some of those. The
multiplier of a part is that of the last setting that selects it. Every number is exact until it meets a tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction

from mergetool import arch
from mergetool.arch import Anatomy, Family
from mergetool.checkpoint.names import quoted
from mergetool.errors import PatternError, UsageError
from mergetool.recipe.graph import number

PRESET = "preset:"
SHAPES = ("linear", "smooth", "bell")

_MAX_TEXT = 400  # characters of a number; what is exact may be long, and 10**400 costs nothing
_LIMIT = Fraction(10) ** 38  # float32 ends at 3.4e38
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}|/[0-9]+)?")
_GRADIENT = re.compile(r"(?P<shape>[A-Za-z]+)\s*\((?P<first>[^(),]*),(?P<last>[^(),]*)\)")


@dataclass(frozen=True, slots=True)
class Gradient:
    """A multiplier over depth: block number n of a stack whose selected blocks are numbered n0 to n1 lies at x = (n - n0) / (n1 - n0).

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
    """The setting that ``text`` spells: ``GROUP=MULT``, ``GROUP=linear(0.2,1)``, ``preset:NAME`` or ``preset:NAME=MULT``.

    Example: ``layers=linear(0.2,1)`` gives ``("layers", Gradient("linear", Fraction(1, 5), Fraction(1)))``. Raises UsageError.
    """
    pattern, equals, value = (part.strip() for part in text.rpartition("="))
    if not equals and value.startswith(PRESET):
        pattern, value = value, "1"
    multiplier = _multiplier(value)
    if not pattern or multiplier is None or (pattern.startswith(PRESET) and isinstance(multiplier, Gradient)):
        raise UsageError(
            f'--set "{text}" is not GROUP=MULT with a finite number, as in --set refiner=0, nor GROUP=SHAPE(FIRST,LAST) with '
            f"{', '.join(SHAPES[:-1])} or {SHAPES[-1]}, as in --set layers=linear(0.2,1), nor {PRESET}NAME."
        )
    return pattern, multiplier


def setting_text(setting: Setting) -> str:
    """A setting as text that ``parse_setting`` reads back to it."""
    pattern, multiplier = setting
    return f"{pattern}={multiplier if isinstance(multiplier, Gradient) else number(multiplier)}"


def expand(settings: Sequence[Setting], family: Family) -> tuple[Setting, ...]:
    """``settings`` with every preset replaced by what it stands for. Raises UsageError for a preset the family does not have."""
    expanded: list[Setting] = []
    for pattern, multiplier in settings:
        if not pattern.startswith(PRESET):
            expanded.append((pattern, multiplier))
            continue
        for text in _preset(pattern.removeprefix(PRESET), family):
            group, value = parse_setting(text)
            assert isinstance(multiplier, Fraction)
            expanded.append((group, value * multiplier))
    return tuple(expanded)


def resolve(settings: Sequence[Setting], anatomy: Anatomy) -> dict[str, Fraction]:
    """The multiplier of every part that a setting selects, by canonical name.

    Raises PatternError for a pattern that selects nothing and for a gradient over what is not two or more numbered blocks of one
    stack, UsageError for an unknown preset.
    """
    chosen: dict[str, Fraction] = {}
    for pattern, multiplier in expand(settings, anatomy.family):
        (names,) = arch.select([pattern], anatomy).values()
        if isinstance(multiplier, Gradient):
            chosen |= _along(multiplier, pattern, names)
        else:
            chosen |= dict.fromkeys(names, multiplier)
    return chosen


def _preset(name: str, family: Family) -> tuple[str, ...]:
    known = {preset.name: preset.settings for preset in family.presets}
    if name in known:
        return known[name]
    if not known:
        raise UsageError(f"the {family.name} family has no presets; give the groups themselves, as in --set ffn=0.5.")
    near = get_close_matches(name, known, n=1)
    hint = f"did you mean {PRESET}{near[0]}" if near else "choose one"
    listed = "; ".join(f"{PRESET}{preset}: {', '.join(settings)}" for preset, settings in known.items())
    raise UsageError(f"the {family.name} family has no preset {quoted(name)}; {hint} ({listed}).")


def _along(gradient: Gradient, pattern: str, names: Collection[str]) -> Mapping[str, Fraction]:
    blocks = {name: arch.block_of(name) for name in sorted(names)}
    outside = [name for name, block in blocks.items() if block is None]
    if outside:
        raise PatternError(
            f"{quoted(pattern)}={gradient} is a gradient over numbered blocks, but {quoted(outside[0])} is in none "
            f"({len(outside)} such tensors); choose blocks, as in layers={gradient} or layers.attention={gradient}."
        )
    found = [block for block in blocks.values() if block is not None]
    stacks = sorted({stack for stack, _ in found})
    numbers = sorted({n for _, n in found})
    if len(stacks) > 1:
        raise PatternError(
            f"{quoted(pattern)}={gradient} is a gradient over the blocks of one stack, but the pattern selects blocks of "
            f"{', '.join(stacks)}; choose one, as in {stacks[-1]}.*={gradient}."
        )
    if len(numbers) < 2:
        raise PatternError(
            f"{quoted(pattern)}={gradient} is a gradient over two blocks or more, but only {stacks[0]}.{numbers[0]} is "
            "selected; give a number."
        )
    span = numbers[-1] - numbers[0]
    at = {n: gradient.at(Fraction(n - numbers[0], span)) for n in numbers}
    return {name: at[block[1]] for name, block in blocks.items() if block is not None}


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
