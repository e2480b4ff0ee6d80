"""What the strong singular values tell of the weak ones."""

from __future__ import annotations

import numpy as np
import pytest

from mergetool.lowrank.tail import noise_count, noise_edge, rank_for_energy


@pytest.mark.parametrize("shape", [(900, 300), (400, 400)])
def test_noise_law_counts_the_singular_values_of_noise(shape: tuple[int, int]) -> None:
    noise = np.linalg.svd(np.random.default_rng(5).standard_normal(shape), compute_uv=False) ** 2
    long, short = shape
    assert noise[0] / noise.mean() == pytest.approx(noise_edge(short, long), rel=0.03)
    for share in (0.05, 0.3, 0.8, 0.99):
        exact = int(np.searchsorted(np.cumsum(noise), share * noise.sum())) + 1
        assert noise_count(share, short, long) == pytest.approx(exact, rel=0.02, abs=1.5)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 2.0])
def test_rank_of_a_power_law_is_read_off_its_head(exponent: float) -> None:
    energies = np.arange(1.0, 501.0) ** -exponent
    target = 0.97 * float(energies.sum())
    exact = int(np.searchsorted(np.cumsum(energies), target)) + 1
    known = min(16, exact - 1)
    bound, estimate = rank_for_energy(energies[:known], float(energies.sum()), target, (800, 500))
    assert bound <= exact
    assert estimate == pytest.approx(exact, rel=0.1)


def test_rank_estimate_never_leaves_the_matrix() -> None:
    assert rank_for_energy(np.array([1e-3]), 1.0, 0.999, (30, 20)) == (20, 20)
    assert rank_for_energy(np.ones(20), 20.0, 19.99, (30, 20)) == (20, 20)
