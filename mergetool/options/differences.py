"""The options that decide the bytes of a difference LoRA, besides its models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, cast

from mergetool.checkpoint.dtypes import BF16, F16, F32, DType
from mergetool.errors import UsageError
from mergetool.lowrank.thresholds import RULES, RuleName, require_threshold, share_of
from mergetool.options.kinds import (
    Choice,
    Flag,
    Integer,
    ModelName,
    Number,
    OutputPath,
    Patterns,
    Size,
    String,
    TwoNumbers,
)
from mergetool.options.merging import LARGEST_SEED, PatternOptions
from mergetool.options.table import Face, Option, Table

FACTORS = {dtype.name: dtype for dtype in (BF16, F16, F32)}
"""The dtypes of stored factors."""

RANK_MAX = 64
"""The largest rank of a matrix by default."""

SHARE = 0.95
"""The threshold by default of the rules that take a share."""

ONE_FILE: dict[Face, str] = {
    "node": "a node writes one file, which it names",
}


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Table):
    """The options for the size of a LoRA's file."""

    budget: Annotated[
        int | str | None,
        Option(
            help="Fit the file into this size, e.g. 300MB, with the ranks that leave the least total error.",
            section="Ranks",
            kind=Size(),
        ),
    ] = None

    @property
    def budget_bytes(self) -> int:
        """``budget`` in bytes, 0 for none."""
        return cast(int, self.budget or 0)


@dataclass(frozen=True, kw_only=True)
class SecondOptions(Table):
    """The options for a difference with a second variant."""

    variant2: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Keep the change that this variant and the first have in common.", section="Models", kind=ModelName()
        ),
    ] = None
    union: Annotated[
        bool, Option(help="With `variant2`: keep both changes, the common part once.", section="Models", kind=Flag())
    ] = False
    weights: Annotated[
        tuple[float, float],
        Option(
            help="With `union`: multiply the part that only the first change has, and the part that only the second has.",
            section="Models",
            kind=TwoNumbers(),
            default="1,1",
        ),
    ] = (1.0, 1.0)
    orthogonal: Annotated[
        bool,
        Option(
            help="With `variant2`: keep the part of the first change that is orthogonal to the second.",
            section="Models",
            kind=Flag(),
        ),
    ] = False

    @property
    def takes_common(self) -> bool:
        """Whether of two differences the common part is taken."""
        return not (self.union or self.orthogonal)

    def check(self) -> None:
        """Raises UsageError for options that contradict each other, or need another."""
        super().check()
        if self.union and self.orthogonal:
            raise UsageError("`union` and `orthogonal` keep different parts of two differences; leave one out.")
        if self.weights != (1.0, 1.0) and not self.union:
            raise UsageError("`weights` multiply the parts that `union` keeps; add `union`.")
        if self.variant2 is None and not self.takes_common:
            name = "union" if self.union else "orthogonal"
            raise UsageError(f"`{name}` needs a second difference; name its variant with `variant2`.")


@dataclass(frozen=True, kw_only=True)
class FileOptions(Table):
    """The files beside the LoRA."""

    full: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write biases, norms and all that has no factors to FILE.safetensors, whole; ComfyUI loads it beside the LoRA.",
            section="Output",
            kind=OutputPath("FILE"),
            missing=ONE_FILE,
        ),
    ] = None
    full_layer: Annotated[
        Sequence[str],
        Option(
            help="Store these matrices whole, in the file of `full`.",
            section="Output",
            kind=Patterns(),
            missing=ONE_FILE,
        ),
    ] = ()
    spectra: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Keep the directions found in FILE.safetensors; runs with another threshold, rank or budget reuse them.",
            section="Output",
            kind=OutputPath("FILE"),
            missing=ONE_FILE,
        ),
    ] = None
    checkpoint: Annotated[
        str | os.PathLike[str] | None,
        Option(
            help="Write the base with the stored change added to FILE.safetensors.",
            section="Output",
            kind=OutputPath("FILE"),
            missing=ONE_FILE,
        ),
    ] = None

    @property
    def beside(self) -> dict[str, str]:
        """The files to write beside the LoRA, by the options' names."""
        places = {name: getattr(self, name) for name in ("spectra", "full", "checkpoint")}
        return {name: os.fspath(place) for name, place in places.items() if place is not None}

    def check(self) -> None:
        """Raises UsageError for matrices that are to be stored whole in no file."""
        super().check()
        if self.full_layer and self.full is None:
            raise UsageError("`full_layer` stores matrices in a second file; name it with `full=FILE.safetensors`.")


@dataclass(frozen=True, kw_only=True)
class DiffOptions(BudgetOptions, PatternOptions, SecondOptions, FileOptions):
    """The options that decide the bytes of a difference LoRA, besides its models.

    With ``rank`` 0, ``rule`` and ``rank_thresh`` choose each matrix's rank, as `lowrank.rules` defines them; with ``budget`` the ranks have
    the least error in a file of that size. With a second variant the LoRA holds the common part, or with ``union`` the union by ``weights``,
    or with ``orthogonal`` the part of the first that is orthogonal to the second (`lowrank.sets`).
    """

    rank: Annotated[
        int,
        Option(help="Give every matrix this rank; 0 chooses each by `rank_thresh`.", section="Ranks", kind=Integer()),
    ] = 0
    rank_thresh: Annotated[
        float | None,
        Option(
            help="Keep this share of each matrix's energy (its squared singular values), or this much as `rule` measures it.",
            section="Ranks",
            kind=Number(above=0),
            default=f"{SHARE}; none for ratio and abs",
        ),
    ] = None
    rank_max: Annotated[
        int | None,
        Option(
            help="Largest rank of a matrix; 0 sets no cap.",
            section="Ranks",
            kind=Integer(),
            default=f"{RANK_MAX}; 0 with `budget`",
        ),
    ] = None
    rule: Annotated[
        RuleName, Option(help="How `rank_thresh` measures a matrix.", section="Ranks", kind=Choice(RULES, "RULE"))
    ] = "energy"
    min_dim: Annotated[
        int, Option(help="Leave out matrices with fewer rows or columns than this.", section="Parts", kind=Integer())
    ] = 32
    dtype: Annotated[
        str,
        Option(help="Store the factors in this dtype.", section="Number format", kind=Choice(tuple(FACTORS), "DTYPE")),
    ] = "bf16"
    seed: Annotated[
        int,
        Option(
            help="Seed of the random directions that the search starts from.",
            section="Ranks",
            kind=Integer(0, LARGEST_SEED),
        ),
    ] = 0

    trigger: Annotated[
        str | None,
        Option(
            help="Write these trigger words into the metadata (modelspec.trigger_phrase).",
            section="Output",
            kind=String("TEXT"),
        ),
    ] = None

    @property
    def cap(self) -> int:
        """``rank_max``, 0 for none."""
        return (0 if self.budget else RANK_MAX) if self.rank_max is None else self.rank_max

    @property
    def stored(self) -> DType:
        """The dtype of the stored factors."""
        return FACTORS[self.dtype]

    @property
    def threshold(self) -> float:
        """``rank_thresh``, which ``knee`` has no use for."""
        return SHARE if self.rank_thresh is None else self.rank_thresh

    @property
    def share(self) -> float | None:
        """The share of each matrix's energy to keep; None where ranks are chosen otherwise."""
        return None if self.rank or self.budget else share_of(self.rule, self.threshold)

    def check(self) -> None:
        """Raises UsageError for options that contradict each other."""
        super().check()
        if self.budget and (self.rank or self.rule != "energy"):
            raise UsageError("`budget` chooses the ranks by itself; leave out `rank` and `rule`.")
        if self.rank and self.rule != "energy":
            raise UsageError("`rank` is the same rank for every matrix; leave out `rule`.")
        if (self.rank or self.budget) and self.rank_thresh is not None:
            raise UsageError(f"`{'budget' if self.budget else 'rank'}` has no threshold; leave out `rank_thresh`.")
        require_threshold(self.rule, self.rank_thresh)
