"""The movement of the anchor's elements in a merge, and the share that rounding let through."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Movement:
    """Sums over elements. For each, in float32: x the anchor's, r the result before rounding, d = r - x its delta,
    q what was stored, p what x rounded to nearest would have been.

    ``moved`` counts d != 0; ``eaten``, of those, q == p: the delta left no trace; ``below_half_ulp``, of those, abs(d)
    smaller than half the spacing of the output dtype at x. ``delta_energy`` is the sum of d * d, ``kept_energy`` that of
    d * (q - p). Elements where d or q - p is not finite are in none of them.
    """

    moved: int = 0
    eaten: int = 0
    below_half_ulp: int = 0
    delta_energy: float = 0.0
    kept_energy: float = 0.0

    @property
    def projection(self) -> float:
        """The share of the delta that was stored, along the wanted delta; 1 without a delta."""
        return self.kept_energy / self.delta_energy if self.delta_energy else 1.0

    def record(self) -> dict[str, int | float]:
        """The figures for JSON, under the names that every command gives them."""
        return {
            "moved": self.moved,
            "eaten": self.eaten,
            "below_half_ulp": self.below_half_ulp,
            "delta_energy": self.delta_energy,
            "projection": self.projection,
        }

    @classmethod
    def total(cls, movements: Iterable[Movement]) -> Movement:
        """The sum, correctly rounded, so that it depends on no order."""
        parts = list(movements)
        return cls(
            sum(part.moved for part in parts),
            sum(part.eaten for part in parts),
            sum(part.below_half_ulp for part in parts),
            math.fsum(part.delta_energy for part in parts),
            math.fsum(part.kept_energy for part in parts),
        )
