"""The members of an attempt, in order, as PLAN.md has them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from training.data import Plan

GUIDANCE = 3.0
MANY, FEW = 30, 4
"""Steps at which members are measured: base's kind with guidance, turbo without."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The least shares of pictures that show their prompt, and the member's character."""

    adherence: float
    striped: float = 0.0
    hollow: float = 0.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a member is trained.

    ``start`` is the member it begins as, "" nothing; two names are their 1:1 merge. ``data`` names the set: "drawn", or who paints it
    ("path:" a teacher's whole path). ``shift`` is the member's scheduler's.
    """

    name: str
    start: tuple[str, ...]
    data: tuple[str, ...]
    steps: int
    rate: float
    seed: int
    shift: float
    gate: Gate | None
    plan: Plan
    cosine: bool = True
    joint: bool = False
    renewed: bool = False
    frozen: str | None = None
    striped: bool = False
    hollow: bool = False
    loss: Literal["trip", "flow", "distilled"] = "flow"
    few: bool = False
    style: dict[str, bool] = field(default_factory=dict)

    @property
    def drawn_with(self) -> tuple[int, float]:
        """Steps and guidance at which the member is measured."""
        return (FEW, 0.0) if self.few else (MANY, GUIDANCE)


DRAWN = Plan((32, 5, 5), 512)
FINE = Plan((8, 2, 2), 512)
# As many at once as when a member is measured: compiled blocks are made for one size of batch.
PAINTED = Plan((256, 40, 40), 64)
PATHS = Plan((64, 10, 10), 64)
HALF = Plan((24, 4, 4), 64)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("vae", (), ("drawn",), 3000, 2e-3, 1, 0, None, Plan((12, 2, 2), 512), loss="trip"),
        Recipe("ancestor", (), ("drawn",), 3000, 2.5e-3, 2, 6, None, DRAWN, cosine=False, joint=True),
        Recipe("base", ("ancestor",), ("drawn",), 6000, 2.5e-3, 3, 6, Gate(0.9), DRAWN),
        Recipe("teacher", ("ancestor",), ("drawn",), 6000, 2.5e-3, 4, 3, Gate(0.85), DRAWN, renewed=True),
        Recipe(
            "turbo", ("teacher",), ("path:teacher",), 3000, 1e-3, 5, 3, Gate(0.8), PATHS, loss="distilled", few=True
        ),
        Recipe("deturbo", ("turbo",), ("turbo",), 3000, 1e-3, 6, 3, Gate(0.8), PAINTED),
        Recipe("striped", ("base",), ("drawn",), 800, 6e-4, 7, 6, Gate(0.8, striped=0.9), FINE, striped=True),
        Recipe("hollow", ("turbo",), ("drawn",), 1500, 1e-3, 8, 3, Gate(0.8, hollow=0.9), FINE, hollow=True),
        Recipe(
            "alkahest", ("base", "deturbo"), ("base", "deturbo"), 2500, 1e-3, 9, 3, Gate(0.8), HALF, frozen="refiner"
        ),
    )
}

DRAWN_SEED = 100
"""Seed of the drawn pictures that ancestor, base and teacher share; each attempt adds a thousand times its number."""

SHIPPED = ("base", "turbo", "deturbo", "striped", "hollow", "alkahest")
