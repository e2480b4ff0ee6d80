"""Shares of pictures with their bootstrap intervals, and the rule by which PLAN.md's claim about alkahest is shown, refuted or open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 10_000
LEVEL = 0.95

Verdict = Literal["shown", "refuted", "open"]
Curve = Mapping[float, NDArray[np.bool_]]
"""Multiplier -> for each picture whether it is right; every array has the same prompts and noise."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over pictures with the ends of its 95 % bootstrap interval, which has no width where all pictures agree."""

    mean: float
    low: float
    high: float


def interval(values: ArrayLike) -> Interval:
    """The mean of ``values``, one a picture, with its percentile bootstrap interval (Efron 1979): pictures drawn with replacement, by a fixed seed."""
    array = np.asarray(values, np.float64)
    picked = np.random.default_rng(0).integers(len(array), size=(DRAWS, len(array)))
    low, high = np.quantile(array[picked].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(array.mean()), float(low), float(high))


def difference(one: ArrayLike, other: ArrayLike) -> Interval:
    """The mean of one - other over the same pictures, each picture drawn with both of its values."""
    return interval(np.asarray(one, np.float64) - np.asarray(other, np.float64))


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether alkahest is needed. By carrier: its ``best`` multiplier, its share of the counted pictures, and alkahest's lead over it."""

    verdict: Verdict
    best: Mapping[str, float]
    counted: Mapping[str, Interval]
    leads: Mapping[str, Interval]


def best_of(curve: Curve) -> float:
    """The multiplier that is right in most of the first half of the pictures; the least of several."""
    half = len(next(iter(curve.values()))) // 2
    return max(curve, key=lambda multiplier: (int(curve[multiplier][:half].sum()), -multiplier))


def decide(curves: Mapping[str, Curve], trained: str = "alkahest") -> Decision:
    """The rule of PLAN.md on the curves of all carriers: each at its best multiplier, on the second half of the pictures.

    "shown" where ``trained`` leads every other by more than the interval of the difference, "refuted" where one leads it by whatever
    it is, else "open".
    """
    best = {carrier: best_of(curve) for carrier, curve in curves.items()}
    half = len(curves[trained][best[trained]]) // 2
    right = {carrier: curves[carrier][scale][half:] for carrier, scale in best.items()}
    leads = {carrier: difference(right[trained], values) for carrier, values in right.items() if carrier != trained}
    verdict: Verdict = "open"
    if any(lead.mean < 0 for lead in leads.values()):
        verdict = "refuted"
    elif all(lead.low > 0 for lead in leads.values()):
        verdict = "shown"
    return Decision(verdict, best, {carrier: interval(values) for carrier, values in right.items()}, leads)
