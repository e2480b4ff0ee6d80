"""Bounds on singular values that were not computed, from the energy they hold together.

All energies are squared singular values; "rank for an energy" is the fewest largest singular values whose
squares add up to it.
"""

from __future__ import annotations

import math

import numpy as np

NOISE_MARGIN = 1.25
"""A value this far above the edge of the noise law cannot be the top of noise: the tail has structure."""


def noise_edge(short: int, long: int) -> float:
    """Largest squared singular value of a noise matrix [long, short], in units of their mean.

    Marchenko & Pastur (1967): (1 + sqrt(short / long))^2.
    """
    return (1 + math.sqrt(short / long)) ** 2


def noise_count(share: float, short: int, long: int) -> float:
    """The number of singular values of a noise matrix that hold ``share`` of its energy.

    They are the strongest of a matrix [long, short].

    From the Marchenko-Pastur density with beta = short / long and lambda = 1 + beta + 2 sqrt(beta) cos(phi):
    the energy above phi is (phi - sin(phi) cos(phi)) / pi, the count the integral of
    2 sin^2 / (pi (1 + beta + 2 sqrt(beta) cos)).
    """
    beta = short / long
    phi = np.linspace(0.0, math.pi, 4097)[1:]
    energy = (phi - np.sin(phi) * np.cos(phi)) / math.pi
    middle = phi - phi[0] / 2
    density = 2 * np.sin(middle) ** 2 / (math.pi * (1 + beta + 2 * math.sqrt(beta) * np.cos(middle)))
    count = np.cumsum(density) * phi[0]
    return short * float(np.interp(share, energy, count / count[-1]))


def _power_law_rank(last: float, known: int, rest: float, need: float, short: int) -> int:
    """Rank for ``need`` more energy when squared values fall as a power of the index and sum to ``rest``."""
    ratio = np.arange(known + 1, short + 1) / known
    low, high = 0.0, 64.0
    for _ in range(50):
        exponent = (low + high) / 2
        if last * float(np.sum(ratio**-exponent)) > rest:
            low = exponent
        else:
            high = exponent
    sums = np.cumsum(last * ratio**-high)
    return known + 1 + int(np.searchsorted(sums, min(need, float(sums[-1]))))


def rank_for_energy(
    energies: np.ndarray[tuple[int], np.dtype[np.float64]], total: float, target: float, shape: tuple[int, int]
) -> tuple[int, int]:
    """Bound and estimate the rank that holds ``target`` of a matrix's energy ``total``. The bound is from below.

    ``energies`` are its largest squared singular values, falling, which together hold less than ``target``.
    The bound is exact when they are: no later value exceeds the last known one. The estimate takes the rest
    for noise (Marchenko-Pastur) if the last known value lies at the edge of such noise, else for a power law
    through that value.
    """
    known, short, long = len(energies), min(shape), max(shape)
    last, captured = float(energies[-1]), float(energies.sum())
    rest, need = total - captured, target - captured
    left = short - known
    if left <= 0 or last <= 0.0 or rest <= 0.0:
        return short, short
    bound = min(known + math.ceil(need / last), short)
    if last <= NOISE_MARGIN * noise_edge(left, long - known) * rest / left:
        estimate = known + math.ceil(noise_count(need / rest, left, long - known))
    else:
        estimate = _power_law_rank(last, known, rest, need, short)
    return bound, min(max(estimate, bound), short)
