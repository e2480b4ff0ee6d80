"""Filters over a parameter, against numpy in float64."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from mergetool.methods import Site, find, smoothing
from tests.methods.parity.case import tensors

SITE = Site("w")


def smoothed(values: np.ndarray) -> np.ndarray:
    """Median of 3 along each dimension, then a Gaussian of deviation 1 cut at 4, mirrored at the edges."""
    padded = np.pad(values, 1, mode="symmetric")
    shifts = [
        tuple(slice(k, k + n) for k, n in zip(s, values.shape, strict=True))
        for s in product(range(3), repeat=values.ndim)
    ]
    result = np.median([padded[shift] for shift in shifts], axis=0)
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    for axis in range(values.ndim):
        wide = np.pad(result, [(4, 4) if i == axis else (0, 0) for i in range(values.ndim)], mode="symmetric")
        moved = np.moveaxis(wide, axis, -1)
        result = np.moveaxis(np.apply_along_axis(np.convolve, -1, moved, kernel / kernel.sum(), "valid"), -1, axis)
    return result


@pytest.mark.parametrize("shape", [(40,), (3,), (30, 17), (2, 3), (6, 5, 3, 3)])
def test_smooth_add_difference_is_the_filters_of_its_definition(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smoothing, "BLOCK", 64)  # several blocks of rows, whose edges must not show
    given = tensors("models", 3, shape)
    a, b, c = (each.double().numpy() for each in given)
    function = find("smooth_add_difference").function
    assert function is not None
    found = function([each.clone() for each in given], SITE, alpha=0.7).numpy()
    np.testing.assert_allclose(found, a + 0.7 * smoothed(b - c), rtol=0, atol=3e-7 * np.abs(a).max())


def test_the_median_of_nine_is_that_of_every_order_of_zeros_and_ones() -> None:
    columns = torch.tensor(list(product([0.0, 1.0], repeat=9))).T
    assert torch.equal(smoothing._median(list(columns)), columns.median(dim=0).values)


def crossed(alpha: float, tilt: float, shape: tuple[int, ...]) -> np.ndarray:
    """What each frequency of the result has of the second: the transform of a difference of 1 at all of them."""
    delta = torch.zeros(shape)
    delta.view(-1)[0] = 1.0
    function = find("crossover").function
    assert function is not None
    found = function([torch.zeros(shape), delta], SITE, alpha=alpha, tilt=tilt)
    return np.fft.fftn(found.double().numpy()).real


@pytest.mark.parametrize("shape", [(16,), (15,), (12, 9), (4, 6, 5)])
@pytest.mark.parametrize(("tilt", "kept"), [(0.0, "high"), (2.0, "low")])
def test_crossover_takes_one_side_of_the_frequencies(shape: tuple[int, ...], tilt: float, kept: str) -> None:
    share = crossed(0.45, tilt, shape)
    squares = [(np.minimum(k := np.arange(n), n - k) / (n // 2)) ** 2 for n in shape]
    frequency = np.sqrt(sum(np.meshgrid(*squares, indexing="ij")) / len(shape))
    expected = frequency > 0.55 if kept == "high" else frequency < 0.45
    np.testing.assert_allclose(share, expected, atol=1e-5)
    assert 0 < expected.sum() < expected.size


def test_crossovers_filter_has_no_jump_at_either_end() -> None:
    for end, beside in ((0.0, 1e-6), (2.0, 2 - 1e-6)):
        np.testing.assert_allclose(crossed(0.37, end, (13, 10)), crossed(0.37, beside, (13, 10)), atol=1e-5)
    np.testing.assert_allclose(crossed(0.37, 1.0, (13, 10)), 0.37, atol=1e-6)
