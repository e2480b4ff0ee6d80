"""The options that decide the bytes of a LoRA made of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, cast

from mergetool.checkpoint.dtypes import DType
from mergetool.errors import UsageError
from mergetool.lowrank.thresholds import RULES, RuleName, require_threshold
from mergetool.options.differences import FACTORS, SHARE, BudgetOptions
from mergetool.options.kinds import Choice, Integer, ModelName, Number, Settings
from mergetool.options.multipliers import Setting
from mergetool.options.running import ThreadOptions, UnmatchedOptions, WriteOptions
from mergetool.options.table import Option, Table, refuse_together


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(BudgetOptions):
    """The options for how much of every module is kept; all of it by default."""

    rank: Annotated[
        int | None,
        Option(help="Give every module this rank, or its own where that is smaller.", section="Ranks", kind=Integer(1)),
    ] = None
    rank_thresh: Annotated[
        float | None,
        Option(
            help="Keep this much of every module, as `rule` measures it; e.g. 0.99 of its energy.",
            section="Ranks",
            kind=Number(above=0),
        ),
    ] = None
    rank_max: Annotated[
        int | None,
        Option(help="Largest rank of a module; goes with a threshold or a budget.", section="Ranks", kind=Integer(1)),
    ] = None
    rule: Annotated[
        RuleName | None,
        Option(
            help="How `rank_thresh` measures a module; knee needs no threshold.",
            section="Ranks",
            kind=Choice(RULES, "RULE"),
            default="energy",
        ),
    ] = None

    @property
    def by_rule(self) -> bool:
        """Whether each module's own singular values choose its rank."""
        return self.rank_thresh is not None or self.rule is not None

    @property
    def threshold(self) -> float:
        """``rank_thresh``, which ``knee`` has no use for."""
        return SHARE if self.rank_thresh is None else self.rank_thresh

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is cut."""
        return not (self.by_rule or self.rank or self.rank_max or self.budget)

    def check(self) -> None:
        """Raises UsageError for options that contradict each other, or need another."""
        super().check()
        by_rule = "rule" if self.rank_thresh is None else "rank_thresh"
        given = {"rank": self.rank is not None, by_rule: self.by_rule, "budget": self.budget is not None}
        refuse_together(given, "give one of them; `rank_max` caps a threshold or a budget")
        refuse_together(
            {"rank": self.rank is not None, "rank_max": self.rank_max is not None},
            "`rank_max` goes with a threshold or a budget",
        )
        if self.by_rule and self.rank_thresh is None and self.rule != "knee":
            raise UsageError(f"`rule={self.rule}` needs a `rank_thresh`.")
        if self.by_rule:
            require_threshold(self.rule or "energy", self.rank_thresh)


@dataclass(frozen=True, kw_only=True)
class LookUpOptions(Table):
    """The options for the model among whose parts names are looked up."""

    model: Annotated[
        str | None,
        Option(
            help="Look the LoRA's names up in this model.",
            section="Models",
            kind=ModelName(),
            default="none; known families need none",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SumOptions(SelectionOptions, LookUpOptions):
    """The options that, besides those, decide the bytes of a sum of LoRAs."""

    dtype: Annotated[
        str | None,
        Option(
            help="Store the factors in this dtype.",
            section="Number format",
            kind=Choice(tuple(FACTORS), "DTYPE"),
            default="that of the inputs' factors",
        ),
    ] = None

    @property
    def stored(self) -> DType | None:
        """The dtype of the stored factors; None keeps each factor's own."""
        return None if self.dtype is None else FACTORS[self.dtype]


@dataclass(frozen=True, kw_only=True)
class GroupOptions(Table):
    """Multipliers of strengths by group."""

    multipliers: Annotated[
        Mapping[str, float | str | Fraction] | Sequence[str | Setting],
        Option(
            help="Multiply all strengths in a group; 0 drops it; the last setting wins.",
            section="Parts",
            kind=Settings(),
            flag="set",
            key="set",
        ),
    ] = ()

    @property
    def settings(self) -> tuple[Setting, ...]:
        """``multipliers`` in their one form."""
        return cast(tuple[Setting, ...], self.multipliers)


@dataclass(frozen=True, kw_only=True)
class SumRunOptions(ThreadOptions, UnmatchedOptions, WriteOptions):
    """The options for making a LoRA of others."""
