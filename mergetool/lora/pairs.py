"""Two checkpoints side by side: which parameters become low-rank factors, and why the others do not.

Policy, for every part (a parameter under its canonical name) of base and variant:

* a matrix of at least ``min_dim`` rows and columns, in both, of equal shape: **decomposed**;
* left out by ``--exclude`` or ``--include``: named, and its share of the difference is measured;
* one-dimensional, smaller than ``min_dim``, of more than two dimensions, or not a module's weight (pad tokens, biases):
  named, and its share of the difference is measured, since no LoRA file can carry it;
* not a float in both, or only in one of the two: named;
* of different shape: an error, unless it is excluded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mergetool import arch
from mergetool.arch import Part
from mergetool.checkpoint.dtypes import BF16, DType
from mergetool.errors import FamilyError, UsageError
from mergetool.lora.rules import Rule, RuleName
from mergetool.recipe.steps import Input


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """What the user asked of a difference LoRA.

    ``rank`` 0 chooses each matrix's rank by ``rule`` and ``rank_thresh`` as `rules` defines them: by default the share of the
    sum of squared singular values to keep. ``budget`` above 0 is the size of the file in bytes instead: the ranks are those with the
    least error. ``rank_max`` 0 means no cap. ``dtype`` is what the factors are stored in.
    """

    rank: int = 0
    rank_thresh: float = 0.95
    rank_max: int = 64
    min_dim: int = 32
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    dtype: DType = BF16
    seed: int = 0
    rule: RuleName = "energy"
    budget: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for a number that cannot be meant."""
        Rule(self.rule, self.rank_thresh)
        for option, value in (
            ("--rank", self.rank),
            ("--rank-max", self.rank_max),
            ("--min-dim", self.min_dim),
            ("--budget", self.budget),
        ):
            if value < 0:
                raise UsageError(f"{option} is {value}, but cannot be negative.")
        if self.budget and (self.rank or self.rule != "energy"):
            raise UsageError("--budget chooses the ranks by itself; leave out --rank and --rule.")
        if self.rank and self.rule != "energy":
            raise UsageError("--rank is the same rank for every matrix; leave out --rule.")

    @property
    def chosen(self) -> Rule:
        """The rule by which ranks are chosen where neither ``rank`` nor ``budget`` says them."""
        return Rule(self.rule, self.rank_thresh)

    @property
    def share(self) -> float | None:
        """The share of each matrix's energy that has to be kept; None where ranks are chosen otherwise."""
        return None if self.rank or self.budget else self.chosen.share


@dataclass(frozen=True, slots=True)
class Pair:
    """One parameter in both models. ``reason`` says why it is not decomposed; empty when it is."""

    base: Part
    variant: Part
    groups: frozenset[str]
    reason: str = ""

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.base.name


@dataclass(frozen=True)
class Pairing:
    """Everything two models have in common, in the variant's file order, and what only one of them has."""

    base: Input
    variant: Input
    pairs: tuple[Pair, ...]
    left_out: tuple[tuple[str, str], ...]  # name, reason

    @property
    def decomposed(self) -> list[Pair]:
        """The matrices that become factors."""
        return [pair for pair in self.pairs if not pair.reason]

    @property
    def bytes_read(self) -> int:
        """Bytes of both models that will be read."""
        return sum(pair.base.nbytes + pair.variant.nbytes for pair in self.pairs)


def pair_up(base: Input, variant: Input, options: DiffOptions) -> Pairing:
    """Pair two models part by part.

    Raises FamilyError for models of different families or shapes, PatternError for a pattern that selects nothing,
    UsageError when nothing is left to decompose.
    """
    family = base.anatomy.family
    if variant.anatomy.family is not family:
        raise FamilyError(
            f"{base.name} is a {family.name} model and {variant.name} a {variant.anatomy.family.name} one; "
            "a difference needs two models of one family."
        )
    chosen = _selected(options.include, base)
    excluded = {
        name: f"excluded: {pattern}"
        for pattern, names in (arch.select(options.exclude, base.anatomy) if options.exclude else {}).items()
        for name in names
    }
    pairs: list[Pair] = []
    left_out: list[tuple[str, str]] = []
    for name, part in variant.anatomy.parts.items():
        other = base.anatomy.parts.get(name)
        if other is None:
            left_out.append((name, f"only in {variant.name}"))
            continue
        reason = excluded.get(name) or ("" if chosen is None or name in chosen else "not in --include")
        if part.shape != other.shape:
            if not reason:
                raise _shape_clash(base, variant, other, part)
            left_out.append((name, f"{reason}, of another shape"))
        elif not (part.dtype.blendable and other.dtype.blendable):
            left_out.append((name, f"{(other if part.dtype.blendable else part).dtype.name} is not a float"))
        else:
            reason = reason or _unfit(other, options.min_dim)
            pairs.append(Pair(other, part, family.groups(name, part.shape), reason))
    left_out += [(n, f"only in {base.name}") for n in base.anatomy.parts if n not in variant.anatomy.parts]
    pairing = Pairing(base, variant, tuple(pairs), tuple(left_out))
    if not pairing.decomposed:
        raise UsageError("no matrix is left to decompose; relax --exclude, --include or --min-dim.")
    return pairing


def _selected(include: Iterable[str], base: Input) -> frozenset[str] | None:
    patterns = tuple(include)
    if not patterns:
        return None
    return frozenset[str]().union(*arch.select(patterns, base.anatomy).values())


def _unfit(part: Part, min_dim: int) -> str:
    if len(part.shape) < 2:
        return "one-dimensional"
    if not part.name.endswith(".weight"):
        return "not a module's weight"
    if len(part.shape) > 2:
        return "more than two dimensions"
    if min(part.shape) < min_dim:
        return f"smaller than {min_dim}"
    return ""


def _shape_clash(base: Input, variant: Input, mine: Part, theirs: Part) -> FamilyError:
    return FamilyError(
        f'tensor "{mine.name}" has shape {list(mine.shape)} in {base.name} but {list(theirs.shape)} in {variant.name}; '
        f'a difference needs equal shapes: leave it out with --exclude "{mine.name}", or pick the matching base.'
    )
