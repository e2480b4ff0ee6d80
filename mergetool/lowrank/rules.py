"""The rules that choose a rank from singular values, each defined once.

s_1 >= s_2 >= ... are the singular values of one matrix of the difference, all of them, before anything is rounded; t is
``rank_thresh``. Ranks are at least 1, except that ``abs`` may keep nothing.

* ``energy``: the fewest r with sum_{i<=r} s_i^2 >= t * sum s_i^2, 0 < t <= 1.
* ``fro``: the fewest r with sqrt(sum_{i<=r} s_i^2 / sum s_i^2) >= t, 0 < t <= 1: ``energy`` at t^2.
* ``sum``: the fewest r with sum_{i<=r} s_i >= t * sum s_i, 0 < t <= 1. The tail counts far more than in ``energy``.
* ``ratio``: all s_i > t * s_1, 0 < t < 1. LyCORIS's ``ratio`` is this t, kohya's ``sv_ratio`` is 1 / t.
* ``abs``: all s_i > t, t > 0, in units of the weights.
* ``knee``: the values before the knee of the curve s_i over i, all i. With x_i = (i - 1) / (n - 1) and
  y_i = (s_i - s_n) / (s_1 - s_n), the knee is the i that maximises 1 - x_i - y_i, the distance below the chord from first to
  last value (Satopaa et al. 2011, "Finding a Kneedle in a Haystack", without smoothing); ties: the first. No t.

``energy`` and ``fro`` need the strongest directions and the total only, ``ratio`` and ``abs`` those above the cut; ``sum`` and
``knee`` need every singular value, for which each matrix is decomposed whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergetool.lowrank.thresholds import RuleName, require_threshold, share_of

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule with its ``threshold``, which ``knee`` has no use for.

    Raises UsageError for a threshold that the rule cannot mean.
    """

    name: RuleName = "energy"
    threshold: float = 0.95

    def __post_init__(self) -> None:
        if self.name != "knee":
            require_threshold(self.name, self.threshold)

    @property
    def share(self) -> float | None:
        """The share of the energy that has to be kept; None where the rule is not about energy."""
        return share_of(self.name, self.threshold)

    @property
    def is_cut(self) -> bool:
        """True where all singular values above one value are kept."""
        return self.name in ("ratio", "abs")

    @property
    def needs_all(self) -> bool:
        """True where no part of the spectrum decides."""
        return self.name in ("sum", "knee")

    def cut(self, largest: float) -> float:
        """The singular value above which all are kept, for a matrix whose largest is ``largest``."""
        return self.threshold * largest if self.name == "ratio" else self.threshold

    def rank(self, energies: Float64, total: float | None = None) -> int | None:
        """Choose a rank from the squared singular values [k], falling.

        ``total`` is the energy of the whole matrix where ``energies`` are only the strongest of it, whose rank may then be None:
        too few are known. Raises ValueError where the rule needs all of them.
        """
        whole = total is None
        if self.needs_all and not whole:
            raise ValueError(f"the rule {self.name} needs the whole spectrum")
        if len(energies) == 0 or energies[0] <= 0:
            return 0
        if self.is_cut:
            count = int((energies > self.cut(math.sqrt(energies[0])) ** 2).sum())
            return count if whole or count < len(energies) else None
        if self.name == "knee":
            return _knee(np.sqrt(energies))
        values = np.sqrt(energies) if self.name == "sum" else energies
        sums = np.cumsum(values)
        share = self.threshold if self.share is None else self.share
        place = int(np.searchsorted(sums, share * (float(sums[-1]) if total is None else total)))
        return place + 1 if place < len(sums) else (len(sums) if whole else None)


ENERGY = Rule()
"""The share of the energy to keep by default."""


def _knee(values: Float64) -> int:
    """The number of falling ``values`` [n] before the knee; 1 at least."""
    if len(values) < 3 or values[0] <= values[-1]:
        return len(values)
    x = np.arange(len(values)) / (len(values) - 1)
    y = (values - values[-1]) / (values[0] - values[-1])
    return max(int(np.argmax(1 - x - y)), 1)
