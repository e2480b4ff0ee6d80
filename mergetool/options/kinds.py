"""The kinds of values: how an option's value is checked, and how it is read from text.

``value`` takes what a program gives, or text, and returns the one form in which the library sees it. Raises ValueError, whose text says what is
wanted, in words that follow "has to be".
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from mergetool.checkpoint.dtypes import DType
from mergetool.errors import UsageError
from mergetool.options.multipliers import Setting, parse_setting, setting_text

MOST = 2**31 - 1
"""The largest count that any option takes."""


class Kind(ABC):
    """The kind of an option's value.

    ``metavar`` stands for it in a line of help; ``many`` lets it be given more than once.
    """

    metavar = "TEXT"
    many = False

    @abstractmethod
    def value(self, given: Any) -> Any:
        """The form in which the library sees ``given``. Raises ValueError with what is wanted, or UsageError with a sentence."""

    def recorded(self, value: Any) -> Any:
        """A value in its one form as JSON has it, and `value` takes it."""
        return list(value) if isinstance(value, tuple) else value

    def read(self, text: str | Sequence[str]) -> Any:
        """The `value` of typed text: one text, or a list of them where there can be ``many``."""
        return self.value(text)


@dataclass(frozen=True, eq=False, repr=False)
class Flag(Kind):
    """True or false."""

    metavar = ""

    def value(self, given: Any) -> bool:
        if not isinstance(given, bool):
            raise ValueError("true or false")
        return given


@dataclass(frozen=True, eq=False, repr=False)
class String(Kind):
    """Any text but an empty one, unless ``empty`` allows it. ``metavar`` describes it."""

    metavar: str = "TEXT"
    empty: bool = False

    def value(self, given: Any) -> str:
        if not isinstance(given, str) or not (given or self.empty):
            raise ValueError("a text")
        return given


@dataclass(frozen=True, eq=False, repr=False)
class ModelName(String):
    """A model: a registered name, a path, an address, ``lab.NAME``, or an expression of those.

    A ``stored`` one cannot be an expression.
    """

    metavar: str = "MODEL"
    stored: bool = False

    def value(self, given: Any) -> str:
        return super().value(os.fspath(given) if isinstance(given, os.PathLike) else given)


@dataclass(frozen=True, eq=False, repr=False)
class File(Kind):
    """A path of a file or folder; a file to write has the given ``ending``."""

    metavar: str = "PATH"

    def value(self, given: Any) -> Path:
        if not isinstance(given, str | os.PathLike) or not os.fspath(given):
            raise ValueError("a path")
        from mergetool.checkpoint.paths import typed

        return Path(typed(os.fspath(given)))


@dataclass(frozen=True, eq=False, repr=False)
class OutputPath(Kind):
    """The name of an output, as typed: a slash at its end makes it a folder."""

    metavar: str = "OUT"

    def value(self, given: Any) -> str:
        if not isinstance(given, str | os.PathLike) or not os.fspath(given):
            raise ValueError("a path")
        return os.fspath(given)


def _folded(word: str) -> str:
    """``fp8-scaled`` for ``FP8_scaled``: programs of the field spell such words either way."""
    return word.lower().replace("_", "-")


@dataclass(frozen=True, eq=False, repr=False)
class Choice(Kind):
    """One of some words, in capitals or not, with ``-`` or ``_``.

    ``known`` is a function where a register knows them.
    """

    known: tuple[str, ...] | Callable[[], Sequence[str]]
    metavar: str = "WORD"

    @property
    def words(self) -> tuple[str, ...]:
        """The words there are."""
        return tuple(self.known() if callable(self.known) else self.known)

    def value(self, given: Any) -> str:
        if isinstance(given, DType):
            given = given.name
        if isinstance(given, str):
            for word in self.words:
                if _folded(word) == _folded(given):
                    return word
        raise ValueError(f"one of {', '.join(self.words)}")


@dataclass(frozen=True, eq=False, repr=False)
class DeviceName(Kind):
    """``auto``, ``cpu``, ``cuda`` or ``cuda:NUMBER``."""

    metavar = "DEVICE"

    def value(self, given: Any) -> str:
        if isinstance(given, str):
            name, colon, number = given.partition(":")
            known = name == "cuda" and number.isascii() and number.isdigit() and len(number) < 4
            if given in ("auto", "cpu", "cuda") or (colon and known):
                return given
        raise ValueError("auto, cpu, cuda or cuda:NUMBER")


@dataclass(frozen=True, eq=False, repr=False)
class Integer(Kind):
    """A whole number of at least ``least`` and at most ``most``."""

    least: int = 0
    most: int = MOST
    metavar: str = "N"

    def value(self, given: Any) -> int:
        if isinstance(given, bool) or not isinstance(given, int) or not self.least <= given <= self.most:
            bound = f"from {self.least}" + ("" if self.most == MOST else f" to {self.most}")
            raise ValueError(f"a whole number {bound}")
        return given

    def read(self, text: str | Sequence[str]) -> int:
        """`value` of digits."""
        digits = isinstance(text, str) and text.strip().removeprefix("-").isdecimal() and len(text) < 40
        return self.value(int(str(text)) if digits else text)


@dataclass(frozen=True, eq=False, repr=False)
class Number(Kind):
    """A finite number: above ``above``, at least ``least``, at most ``most``. Each bound is optional."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    metavar: str = "X"

    def value(self, given: Any) -> float:
        number = None if isinstance(given, str) else _number(given)
        inside = number is not None and self.least <= number <= self.most and number > self.above
        if number is None or not inside:
            bounds = (("above", self.above), ("from", self.least), ("up to", self.most))
            words = [f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound)]
            meant = f"; write {_decimal(given)}" if isinstance(given, str) and _is_slip(given) else ""
            raise ValueError(" ".join(["a number", *words]) + meant)
        return number

    def read(self, text: str | Sequence[str]) -> float:
        """`value` of a number that was typed."""
        number = _number(text)
        return self.value(text if number is None else number)


@dataclass(frozen=True, eq=False, repr=False)
class Share(Kind):
    """A share above 0: 0.01, or as text ``1%``."""

    metavar: str = "SHARE"

    def value(self, given: Any) -> float:
        percent = isinstance(given, str) and given.strip().endswith("%")
        number = _number(given.strip().removesuffix("%") if percent else given)
        if number is None or not 0 < (number / 100 if percent else number) < 1e6:
            raise ValueError("a share such as 0.8% or 0.008")
        return number / 100 if percent else number


@dataclass(frozen=True, eq=False, repr=False)
class Size(Kind):
    """Bytes: a whole number above 0, or as text ``300MB``."""

    metavar: str = "SIZE"

    def value(self, given: Any) -> int:
        if isinstance(given, str):
            given = _bytes(given)
        if isinstance(given, bool) or not isinstance(given, int) or not 0 < given < 2**63:
            raise ValueError("a size above 0, in bytes or as in 300MB, 2GB or 4GiB")
        return given


def _bytes(text: str) -> object:
    """Bytes of ``300MB`` or ``2GB`` (decimal) or ``4GiB`` (binary), or ``text`` where it is no size."""
    units = {"": 1, "B": 1}
    for i, letter in enumerate("KMGT", 1):
        units |= {f"{letter}B": 1000**i, f"{letter}IB": 1024**i, letter: 1000**i}
    digits = text.strip().rstrip("BKMGTIbkmgti ")
    with suppress(KeyError, ValueError, OverflowError):
        return int(float(digits) * units[text.strip()[len(digits) :].strip().upper()])
    return text


@dataclass(frozen=True, eq=False, repr=False)
class Patterns(Kind):
    """Groups, globs over tensor names, and ``re:`` expressions."""

    metavar: str = "PATTERN"
    many = True

    def value(self, given: Any) -> tuple[str, ...]:
        if isinstance(given, str):
            raise ValueError(f'a list, as in ["{given}"]')
        try:
            patterns = tuple(given)
        except TypeError:
            raise ValueError("a list of patterns") from None
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError("a list of texts")
        return patterns


@dataclass(frozen=True, eq=False, repr=False)
class Models(Patterns):
    """Several models, each as for `Model`."""

    metavar: str = "MODEL"
    stored: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class Settings(Kind):
    """Multipliers by group: a mapping, or texts like ``layers=linear(0.2,1)``; the last wins."""

    metavar: str = "GROUP=MULT"
    many = True

    def value(self, given: Any) -> tuple[Setting, ...]:
        if isinstance(given, str):
            raise ValueError('a mapping, as in {"refiner": 0}')
        if isinstance(given, Mapping):
            return tuple(parse_setting(f"{pattern}={_exact(number)}") for pattern, number in given.items())
        return tuple(parse_setting(setting) if isinstance(setting, str) else setting for setting in given)

    def recorded(self, value: tuple[Setting, ...]) -> list[str]:
        return [setting_text(setting) for setting in value]


@dataclass(frozen=True, eq=False, repr=False)
class NamedModels(Kind):
    """A mapping of names to models, or texts such as ``tuned=/models/tuned.safetensors``."""

    metavar: str = "NAME=MODEL"
    many = True

    def value(self, given: Any) -> dict[str, str]:
        if isinstance(given, Mapping):
            return {str(name): os.fspath(place) for name, place in given.items()}
        if isinstance(given, str):
            raise ValueError('a mapping, as in {"tuned": "/models/tuned.safetensors"}')
        return dict(self._place(text) for text in given)

    def _place(self, text: str) -> tuple[str, str]:
        name, equals, where = text.partition("=")
        if not (name and equals and where):
            raise UsageError(f'`inputs` "{text}" is not NAME=MODEL, as in tuned=/models/tuned.safetensors.')
        return name, where


@dataclass(frozen=True, eq=False, repr=False)
class Loras(Kind):
    """LoRAs with strengths: a mapping of paths to numbers, or ``style.safetensors:0.8``."""

    metavar: str = "LORA[:STRENGTH]"
    many = True

    def value(self, given: Any) -> tuple[tuple[str, Fraction], ...]:
        if isinstance(given, str):
            raise ValueError(f'a mapping of LoRAs to strengths, as in {{"{given}": 1}}')
        if isinstance(given, Mapping):
            return tuple(
                (os.fspath(path), _strength(os.fspath(path), str(_exact(size)))) for path, size in given.items()
            )
        entries = list(given)
        if all(isinstance(entry, str) for entry in entries):
            return tuple(with_strengths(entries))
        return tuple(entries)


@dataclass(frozen=True, eq=False, repr=False)
class Strength(Kind):
    """The exact strength of one LoRA."""

    metavar: str = "S"

    def value(self, given: Any) -> Fraction:
        text = str(_exact(given))
        if _number(given) is None:
            meant = f"; write {_decimal(text)}" if _is_slip(text) else ""
            raise ValueError(f"a finite number such as 0.8{meant}")
        return given if isinstance(given, Fraction) else _strength(text, text)


_AMOUNT = r"[+-]?\d+(?:[.,]\d+)?\s*%?"


def _is_slip(text: str) -> bool:
    """Whether a text is a number that is written with a comma or in per cent."""
    return bool(re.fullmatch(_AMOUNT, text)) and _decimal(text) != text


def with_strengths(texts: Sequence[str]) -> list[tuple[str, Fraction]]:
    """`with_strength` of each. Raises UsageError, with what to write, for a strength beside its LoRA, with a comma or in per cent."""
    for i, text in enumerate(texts):
        path, _, amount = text.rpartition(":")
        if not re.fullmatch(_AMOUNT, amount) or Path(text).exists():
            continue
        if not path and i:
            raise UsageError(f'a strength follows its LoRA after a colon: write "{texts[i - 1]}:{_decimal(amount)}".')
        if path and amount != _decimal(amount) and not amount.startswith("+"):
            raise UsageError(f'"{text}": a strength is a number with a point: write "{path}:{_decimal(amount)}".')
    return [with_strength(text) for text in texts]


def with_strength(text: str) -> tuple[str, Fraction]:
    """The path and the strength of ``LORA[:STRENGTH]``.

    A colon is part of the path unless a number follows, or where a file of the whole name exists.

    Example: ``style.safetensors:-0.3`` gives ``("style.safetensors", Fraction(-3, 10))``. Raises UsageError for a strength that is
    not finite or no number, and where both readings name a file.
    """
    path, colon, number = text.rpartition(":")
    if colon and path and os.path.lexists(path):
        if os.path.lexists(text):
            raise UsageError(f'"{text}" is a file, and so is "{path}"; write "{text}:1" for the first, or rename it.')
        if _number(number) is None and not re.search("nan|inf", number, re.IGNORECASE):
            raise UsageError(f'"{text}" is no LoRA with a strength; write "{path}:0.8".')
    elif os.path.lexists(text):
        return text, Fraction(1)
    try:
        float(number)
    except ValueError:
        return text, Fraction(1)
    return (path, _strength(text, number)) if colon and path else (text, Fraction(1))


def _strength(text: str, number: str) -> Fraction:
    value = float(number)
    if not math.isfinite(value) or len(number) > 40:
        raise UsageError(f'"{text}": the strength {number[:40]} is not a finite number.')
    # Not Fraction("1e-999999999"), which is zero to every program and a number of a billion digits here.
    return Fraction(number.strip()) if value else Fraction(0)


def _decimal(amount: str) -> str:
    """A number as people write it, with a point and without a per cent sign."""
    digits = amount.replace(",", ".").rstrip("% ")
    return str(Decimal(digits) / 100) if "%" in amount else digits


@dataclass(frozen=True, eq=False, repr=False)
class TwoNumbers(Kind):
    """Two finite numbers, or as text ``1,0.5``."""

    metavar: str = "W1,W2"

    def value(self, given: Any) -> tuple[float, float]:
        pair = given.split(",") if isinstance(given, str) else given
        numbers = [_number(number) for number in pair] if isinstance(pair, Sequence) else []
        if len(numbers) != 2 or numbers[0] is None or numbers[1] is None:
            raise ValueError("two numbers, as in 1,0.5")
        return numbers[0], numbers[1]


def _number(given: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(given, bool) or not isinstance(given, int | float | Decimal | Fraction | str):
        return None
    try:
        number = float(given)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _exact(number: object) -> object:
    """A number as text that has all its digits."""
    return repr(number) if isinstance(number, float) else number


def shown(given: object) -> str:
    """A refused value, short, for a sentence."""
    text = str(given) if isinstance(given, str | Decimal | Fraction) else repr(given)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f'"{text}"' if isinstance(given, str) else text


def sentence(name: str, given: object, wanted: str) -> UsageError:
    """The error for a value that is not valid, in every face's words."""
    return UsageError(f"`{name}` is {shown(given)}, but has to be {wanted}.")
