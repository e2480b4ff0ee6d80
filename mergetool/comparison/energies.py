"""Sums of squares over two models and their difference: distances, cosines, multipliers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True)
class Energies:
    """Sums of squares over ``elements`` of the models, the delta and a reference delta.

    The models are base, variant, and the one that the delta = variant - base is added to; ``shared`` is the sum of
    delta * reference delta.
    """

    elements: int = 0
    base: float = 0.0
    variant: float = 0.0
    delta: float = 0.0
    onto: float = 0.0
    reference: float = 0.0
    shared: float = 0.0

    @classmethod
    def total(cls, parts: Iterable[Energies]) -> Energies:
        """The sums over all, correctly rounded, so that they depend on no order."""
        energies = list(parts)
        names = [each.name for each in fields(cls)][1:]
        return cls(
            sum(part.elements for part in energies),
            *(math.fsum(getattr(part, name) for part in energies) for name in names),
        )

    @property
    def distance(self) -> float:
        """||delta|| / ||base||; 0 where nothing changed, infinite where something became of zeros."""
        return _ratio(self.delta, self.base)

    @property
    def cosine(self) -> float | None:
        """The cosine between delta and reference delta; None where one of them is zero."""
        size = math.sqrt(self.delta) * math.sqrt(self.reference)
        return self.shared / size if size else None

    @property
    def to_reference(self) -> float | None:
        """The m that makes ||m * delta|| that of the reference; None where one of them is zero."""
        return math.sqrt(self.reference / self.delta) if self.delta and self.reference else None

    def to_change(self, share: float) -> float | None:
        """The m that makes ||m * delta|| a ``share`` of ||onto||.

        None where one of the two is zero; ``onto`` is what the delta is added to.
        """
        return share * math.sqrt(self.onto / self.delta) if self.delta and self.onto else None


@dataclass(frozen=True, slots=True)
class Distance:
    """One parameter under its canonical name, with its sums."""

    name: str
    groups: frozenset[str]
    energies: Energies


def relative(distances: Sequence[Distance], wanted: Callable[[Distance], bool] = lambda _: True) -> float:
    """The norm of the delta over that of the base, over the parts ``wanted``. 0 where there are none."""
    return Energies.total(distance.energies for distance in distances if wanted(distance)).distance


def percent(share: float) -> str:
    """A share with three digits."""
    return f"{100 * share:.3g} %"


def _ratio(of: float, to: float) -> float:
    return math.sqrt(of / to) if to else 0.0 if not of else math.inf
