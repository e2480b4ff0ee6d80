"""The strongest directions of a difference, found once: what every rank, rule and budget up to their number is chosen from.

Only the shorter side's vectors are kept, in bf16, a third of what a LoRA of the same ranks takes. Rounding them tilts a direction by
1e-3, which moves 1e-6 of its energy to the outside; whoever uses them projects the delta onto them again in float32, and refines them
where the threshold is nearer than that (``svd.decompose`` with ``rows``). So the file is as certain as without them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from mergetool.difference.delta import Delta
from mergetool.lowrank.rules import Float64, Rule
from mergetool.lowrank.svd import Decomposition, decompose
from mergetool.options.differences import DiffOptions

EXTRA = 8
"""Rows beyond the chosen rank to project onto: what rounding moved between neighbours is found again."""

FAITHFUL = 1e-3
"""Share of their stated energy that directions may lack before they are not believed; rounding them takes 1e-6."""


def rule_of(options: DiffOptions) -> Rule:
    """The rule by which ranks are chosen where neither a rank nor a budget says them."""
    return Rule(options.rule, options.threshold)


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """What is known of one delta [m, n]: ``rows`` bf16 [k, min(m, n)], strongest first, and its singular values.

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
        """Those of a decomposition that was asked for ``asked`` directions (0: for as many as its rule wanted)."""
        short = min(found.left.shape[0], found.right.shape[1])
        tall = found.left.shape[0] >= found.right.shape[1]
        rows = found.right if tall else found.left.T
        values = found.singular_values if found.spectrum is None else found.spectrum
        complete = found.rank == short or found.rank < asked
        return cls(rows.bfloat16().contiguous(), values.float(), found.total_energy, complete)


def find(name: str, delta: Delta, options: DiffOptions, most: int) -> Directions:
    """Search for the ``most`` strongest directions of ``delta``, or with 0 for those that the rule keeps."""
    rule = rule_of(options)
    short = min(delta.matrix.shape)
    spectrum = None
    if rule.needs_all and not options.rank and not options.budget:
        found = _decompose(name, delta, options, rank_max=most or short)
        spectrum = found.spectrum
        if found.rank >= min(most, short) or not most:
            return Directions.of(found, 0)
    found = (
        _decompose(name, delta, options, rank=min(most, short))
        if most
        else _decompose(name, delta, options, rank_max=0)
    )
    return Directions.of(found if spectrum is None else replace(found, spectrum=spectrum), min(most, short))


def _decompose(name: str, delta: Delta, options: DiffOptions, rank: int = 0, rank_max: int = 0) -> Decomposition:
    rule = rule_of(options)
    return decompose(
        delta.matrix,
        name=name,
        rank=rank,
        rank_thresh=rule.threshold,
        rank_max=rank_max,
        seed=options.seed,
        sketch=delta.sketch,
        energy=delta.energy,
        rule=rule.name,
    )


def suffice(known: Directions, options: DiffOptions, shape: tuple[int, ...]) -> bool:
    """True when ``known`` decides what ``options`` keep of a delta of ``shape``, without another search."""
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
    delta: Delta,
    known: Directions,
    options: DiffOptions,
    rank: int | None = None,
    share: float | None = None,
) -> Decomposition:
    """What ``options`` keep of ``delta``, by a float32 projection onto ``known``, or by a search where that is not enough.

    ``rank`` is a budget's choice; ``share`` overrides the rule's share of the energy.
    """
    rule, short = rule_of(options), min(delta.matrix.shape)
    name_of_rule, threshold = rule.name, rule.threshold
    cap, wanted = options.cap, 0
    if share is not None:
        name_of_rule, threshold = "energy", share
    rank = options.rank if rank is None else rank
    if not rank and rule.needs_all and len(known.values) == short:
        wanted = rule.rank(known.energies) or 0
        rank = min(wanted, cap or wanted)
    guess = rank or (None if rule.needs_all else rule.rank(known.energies[: known.count], known.total)) or known.count
    rows = known.rows[: min(guess + max(EXTRA, guess // 50), known.count)]
    asked = partial(
        decompose,
        delta.matrix,
        name=name,
        rank=rank,
        rank_thresh=threshold,
        rank_max=cap,
        seed=options.seed,
        sketch=delta.sketch,
        energy=delta.energy,
        rule=name_of_rule,
    )
    found = asked(rows=rows, complete=known.complete and len(rows) == known.count)
    if found.captured_energy < (1 - FAITHFUL) * float(known.energies[: found.rank].sum()):
        found = asked()  # these are not the directions of those values: the file was tampered with
    if wanted > rank:
        found = replace(found, capped=True, rank_wanted=wanted)
    return found
