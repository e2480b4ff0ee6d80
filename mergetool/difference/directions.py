"""The strongest directions of a difference, found once, used for any rank, rule or budget.

A search serves every choice up to its number.

Only the shorter side's vectors are kept, in bf16, a third of what a LoRA of the same ranks takes. Rounding them tilts a direction by
1e-3, which moves 1e-6 of its energy to the outside; whoever uses them projects the delta onto them again in float32, and refines them
where the threshold is nearer than that (``svd.decompose`` with ``rows``). So the file is as certain as without them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.matrices import Dense
from mergetool.lowrank.rules import Float64, Rule
from mergetool.options.differences import DiffOptions

EXTRA = 8
"""Rows beyond the chosen rank to project onto: they recover the energy that rounding moved between neighbours."""

FAITHFUL = 1e-3
"""Share of their stated energy that directions may lack before they are not believed; rounding them takes 1e-6."""


def rule_of(options: DiffOptions) -> Rule:
    """The rule by which ranks are chosen where neither a rank nor a budget says them."""
    return Rule(options.rule, options.threshold)


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """Known directions of one delta [m, n]: ``rows`` bf16 [k, min(m, n)] and singular values. The strongest come first.

    ``values`` [j] float32, falling, are the first j = k singular values, or all min(m, n) of them; ``total`` the whole energy.
    ``complete`` says that there are no more than k directions that are not zero.
    """

    rows: Tensor
    values: Tensor
    total: float
    complete: bool

    @property
    def energies(self) -> Float64:
        """Squared singular values, float64 [j]."""
        return np.asarray(self.values.double().square().numpy())

    @property
    def count(self) -> int:
        """Directions that are known."""
        return len(self.rows)

    def first(self, count: int) -> Directions:
        """The same with the first ``count`` directions only."""
        if count >= self.count:
            return self
        values = self.values if len(self.values) > self.count else self.values[:count]
        return Directions(self.rows[:count].clone(), values.clone(), self.total, False)

    @classmethod
    def of(cls, found: Decomposition, asked: int) -> Directions:
        """Keep the directions of a decomposition that sought ``asked`` of them. 0 is as many as its rule wanted."""
        short = min(found.left.shape[0], found.right.shape[1])
        tall = found.left.shape[0] >= found.right.shape[1]
        rows = found.right if tall else found.left.T
        values = found.singular_values if found.spectrum is None else found.spectrum
        complete = found.rank == short or found.rank < asked
        return cls(rows.bfloat16().contiguous(), values.float(), found.total_energy, complete)


def find(name: str, delta: Dense, options: DiffOptions, most: int) -> Directions:
    """Search for the ``most`` strongest directions of ``delta``. With 0 search for those that the rule keeps."""
    rule, short, spectrum = rule_of(options), delta.width, None
    strongest = partial(delta.strongest, name=name, rule=rule, seed=options.seed)
    if rule.needs_all and not options.rank and not options.budget:
        found = strongest(rank_max=most or short)
        spectrum = found.spectrum
        if found.rank >= min(most, short) or not most:
            return Directions.of(found, 0)
    found = strongest(rank=min(most, short))
    return Directions.of(found if spectrum is None else replace(found, spectrum=spectrum), min(most, short))


def suffice(known: Directions, options: DiffOptions, shape: tuple[int, ...]) -> bool:
    """Whether ``known`` directions decide what ``options`` keep, without another search.

    The delta has the given ``shape``.
    """
    short = min(shape)
    cap = min(options.rank or options.cap or short, short)
    if options.rank:
        return known.complete or known.count >= cap
    rule = rule_of(options)
    if rule.needs_all:
        whole = len(known.values) == short
        return whole and (known.complete or known.count >= min(rule.rank(known.energies) or 0, cap))
    if known.complete or known.count >= cap:
        return True
    wanted = rule.rank(known.energies[: known.count], known.total)
    return wanted is not None and wanted <= known.count


def from_directions(
    name: str,
    delta: Dense,
    known: Directions,
    options: DiffOptions,
    rule: Rule,
    rank: int | None = None,
) -> Decomposition:
    """Decompose ``delta`` by a float32 projection onto ``known``, or by a search.

    ``known`` directions may not be enough for ``options``.

    Ranks are chosen by ``rule``, or are a budget's choice.
    """
    cap, wanted = options.cap, 0
    rank = options.rank if rank is None else rank
    if not rank and rule.needs_all and len(known.values) == delta.width:
        wanted = rule.rank(known.energies) or 0
        rank = min(wanted, cap or wanted)
    # By the options' own rule: what a stricter one keeps beyond is among the extra rows.
    own = rule_of(options)
    guess = rank or (None if own.needs_all else own.rank(known.energies[: known.count], known.total)) or known.count
    rows = known.rows[: min(guess + max(EXTRA, guess // 50), known.count)]
    asked = partial(delta.strongest, name=name, rank=rank, rule=rule, rank_max=cap, seed=options.seed)
    found = asked(rows=rows, complete=known.complete and len(rows) == known.count)
    if found.captured_energy < (1 - FAITHFUL) * float(known.energies[: found.rank].sum()):
        found = asked()  # these are not the directions of those values: the file was tampered with
    if wanted > rank:
        found = replace(found, capped=True, rank_wanted=wanted)
    return found
