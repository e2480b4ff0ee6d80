"""The options of a comparison: its measurements, its reference, its conditions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, cast

from mergetool.checkpoint import dtypes
from mergetool.errors import UsageError
from mergetool.options.kinds import Choice, File, Kind, ModelName, Patterns, Share
from mergetool.options.running import OverwriteOptions, ReaderOptions
from mergetool.options.table import Option

RECOMMENDED = "recommended"
TARGET = 0.01
"""The target of a change by default, as a share of the norm: enough to survive rounding to bf16 (whose unit is 0.4 to
0.8 % of a weight), and less than any fine-tune of the embedded family moved its base."""

METRICS = ("distance", "cosine", "reference", "target", "untraced", "lost")

_CONDITION = re.compile(
    r"(?:(?P<group>[^:<>]+):)?(?P<metric>[a-z]+)(?P<sign>[<>])(?P<number>[-+.0-9eE]+)(?P<percent>%?)"
)


@dataclass(frozen=True, slots=True)
class Condition:
    """A ``metric`` of ``group`` above or below ``limit``; a comparison fails where it holds.

    Without a ``group`` it is of all parts.
    """

    group: str | None
    metric: str
    sign: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Condition:
        """``METRIC>NUMBER`` or ``GROUP:METRIC<NUMBER``, the number also in per cent. Raises UsageError."""
        match = _CONDITION.fullmatch(text.replace(" ", ""))
        if match is None or match["metric"] not in METRICS:
            raise UsageError(
                f'`fail_on` "{text}" is not METRIC>NUMBER or GROUP:METRIC>NUMBER with one of {", ".join(METRICS)}, as in "distance>10%".'
            )
        try:
            number = float(match["number"])
        except ValueError:
            raise UsageError(f'`fail_on` "{text}": "{match["number"]}" is not a number.') from None
        return cls(match["group"], match["metric"], match["sign"], number / (100 if match["percent"] else 1))

    def holds(self, value: float) -> bool:
        """Whether ``value`` is beyond the limit."""
        return value > self.limit if self.sign == ">" else value < self.limit


@dataclass(frozen=True, eq=False, repr=False)
class Conditions(Kind):
    """Several conditions, as text."""

    metavar: str = "CONDITION"
    many = True

    def value(self, given: Any) -> tuple[Condition, ...]:
        if isinstance(given, str):
            raise ValueError(f'a list, as in ["{given}"]')
        return tuple(
            condition if isinstance(condition, Condition) else Condition.parse(condition) for condition in given
        )


@dataclass(frozen=True, eq=False, repr=False)
class Multiplied(Kind):
    """An exact number other than 0, or the word "recommended"."""

    metavar: str = "M"

    def value(self, given: Any) -> Fraction | str:
        if given == RECOMMENDED:
            return RECOMMENDED
        # As text, a float is the number that was written. float() comes first: Fraction("1e-999999999") has a billion digits.
        text = str(given) if isinstance(given, int | float | Decimal) and not isinstance(given, bool) else given
        with suppress(ValueError, OverflowError):
            is_number = isinstance(text, Fraction) or (isinstance(text, str) and len(text) < 40)
            if is_number and 0 < abs(float(text)) < 1e38:
                return Fraction(text)
        raise ValueError(f"a number other than 0, or the word {RECOMMENDED}")


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ReaderOptions, OverwriteOptions):
    """The options for comparing two models."""

    reference: Annotated[
        str | None,
        Option(
            help="Compare with the change of this fine-tune, whose size is known to be right.",
            section="Models",
            kind=ModelName(),
        ),
    ] = None
    reference_base: Annotated[
        str | None,
        Option(help="Subtract this model from the reference.", section="Models", kind=ModelName(), default="`base`"),
    ] = None
    onto: Annotated[
        str | None,
        Option(
            help="The model that you will add the difference to.", section="Models", kind=ModelName(), default="`base`"
        ),
    ] = None
    multiplier: Annotated[
        float | str | Fraction,
        Option(
            help=f'Measure rounding loss with this multiplier; "{RECOMMENDED}" takes the advised one.',
            section="Checks",
            kind=Multiplied(),
            short="-m",
        ),
    ] = 1
    target: Annotated[
        float | str,
        Option(
            help="Advise the multiplier that changes `onto` by this share of its norm.",
            section="Checks",
            kind=Share(),
            default="1%",
        ),
    ] = TARGET
    include: Annotated[Sequence[str], Option(help="Compare only these parts.", section="Parts", kind=Patterns())] = ()
    exclude: Annotated[
        Sequence[str],
        Option(
            help="Leave these parts out.", section="Parts", kind=Patterns(), default="none; totals omit the refiners"
        ),
    ] = ()
    dtype: Annotated[
        str | None,
        Option(
            help="Measure rounding loss as if the merge were stored in this dtype.",
            section="Number format",
            kind=Choice(tuple(dtypes.OUTPUT), "DTYPE"),
            default="that of `onto`",
        ),
    ] = None
    fail_on: Annotated[
        Sequence[str | Condition],
        Option(help='End with exit code 1 if this holds, e.g. "distance>10%".', section="Checks", kind=Conditions()),
    ] = ()
    plot: Annotated[
        Path | str | None,
        Option(help="Draw the distances of all blocks as a heat map.", section="Output", kind=File("FILE.png")),
    ] = None
    report: Annotated[
        Path | str | None, Option(help="Write the results as one HTML page.", section="Output", kind=File("FILE.html"))
    ] = None

    @property
    def size(self) -> Fraction | str:
        """``multiplier`` in its one form."""
        return cast("Fraction | str", self.multiplier)

    @property
    def share(self) -> float:
        """``target`` in its one form."""
        return cast(float, self.target)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """``fail_on`` in its one form."""
        return cast("tuple[Condition, ...]", self.fail_on)
