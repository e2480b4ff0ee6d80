"""Choose how much of a sum of LoRAs to keep: all, a rank, a rule, or a file's size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergetool.checkpoint.dtypes import DType
from mergetool.difference.budget import Spectrum, ranks_for
from mergetool.errors import UsageError
from mergetool.lora.gathering import GatheredModule
from mergetool.lowrank.rules import Rule
from mergetool.options.combining import SelectionOptions

_KERNEL, _ALPHA = 2 * 24, 80  # bytes of header, and of the header's padding


@dataclass(frozen=True, slots=True)
class Exact:
    """All of it, by concatenation."""

    def rank_of(self, values: Tensor) -> int:
        """All."""
        return len(values)

    def recipe(self) -> dict[str, Any]:
        """The choice as the metadata records it."""
        return {}


@dataclass(frozen=True, slots=True)
class Fixed:
    """The same rank for every module, fewer where it has no more."""

    rank: int

    def __post_init__(self) -> None:
        """Raises UsageError for a rank below 1."""
        if self.rank < 1:
            raise UsageError(f"`rank` is {self.rank}, but a LoRA has a rank of at least 1.")

    def recipe(self) -> dict[str, Any]:
        """The choice as the metadata records it."""
        return {"rank": self.rank}


@dataclass(frozen=True, slots=True)
class ByRule:
    """A rank for every module by its own spectrum, at most ``most``. Raises UsageError for a ``most`` below 1."""

    rule: Rule
    most: int | None = None

    def __post_init__(self) -> None:
        _require_cap(self.most)

    def wanted(self, values: Tensor) -> int:
        """The number of falling singular values that the rule keeps."""
        return self.rule.rank(values.square().numpy()) or 0

    def rank_of(self, values: Tensor) -> int:
        """The rank to keep of the falling singular values."""
        return min(self.wanted(values), len(values) if self.most is None else self.most)

    def recipe(self) -> dict[str, Any]:
        """The choice as the metadata records it."""
        share = {"rank_thresh": self.rule.threshold} if self.rule.name != "knee" else {}
        return {"rule": self.rule.name} | share | _stated(self.most)


@dataclass(frozen=True, slots=True)
class Budget:
    """Keep the least total error in a file of at most so many bytes.

    Ranks are ``most`` at most. Raises UsageError for a ``most`` below 1.
    """

    size: int
    most: int | None = None

    def __post_init__(self) -> None:
        _require_cap(self.most)

    def recipe(self) -> dict[str, Any]:
        """The choice as the metadata records it."""
        return {"budget": self.size} | _stated(self.most)


def _require_cap(most: int | None) -> None:
    if most is not None and most < 1:
        raise UsageError(f"`rank_max` is {most}, but a LoRA has a rank of at least 1.")


def _stated(most: int | None) -> dict[str, Any]:
    return {} if most is None else {"rank_max": most}


Selection = Exact | Fixed | ByRule | Budget


def selected(options: SelectionOptions) -> Selection:
    """Read the choice from the options."""
    if options.rank is not None:
        return Fixed(options.rank)
    if options.budget is not None:
        return Budget(options.budget_bytes, options.rank_max)
    if options.by_rule:
        return ByRule(Rule(options.rule or "energy", options.threshold), options.rank_max)
    return Exact() if options.rank_max is None else Fixed(options.rank_max)


def ranks_within(
    budget: Budget,
    modules: Sequence[GatheredModule],
    spectra: Sequence[Tensor],
    dtype: DType,
    metadata: Mapping[str, str],
) -> dict[str, int]:
    """Choose each part's rank for the least error in a file of at most ``budget.size`` bytes.

    The header counts (`budget.ranks_for`).

    Raises UsageError where not even one direction fits.
    """
    known = [
        Spectrum(module.keys.down, module.keys.up, module.matrix, values.square().numpy()[: budget.most])
        for module, values in zip(modules, spectra, strict=True)
    ]
    # What a plain pair of matrices does not have: a kernel's dimensions in two shapes, and an alpha.
    beside = sum(
        _KERNEL * (len(module.shape) > 2) + module.keys.always_alpha * (len(module.keys.alpha) + _ALPHA)
        for module in modules
    )
    ranks = ranks_for(known, budget.size - beside, dtype, metadata)
    return {module.part: rank for module, rank in zip(modules, ranks, strict=True)}
