"""model_stock and geometric_median against what defines them, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.methods.parity.case import tensors
from tests.methods.test_sparse import Floats, call, close, stacked

DELTAS = tensors("deltas", 4, (31, 17))


def stock(d: Floats) -> Floats:
    """Model stock of differences, each flattened to one row."""
    n = len(d)
    unit = d / np.linalg.norm(d, axis=1, keepdims=True)
    cosine = max(0, ((unit @ unit.T).sum() - n) / (n * (n - 1)))
    return n * cosine / (1 + (n - 1) * cosine) * d.mean(axis=0)


def test_model_stock_shrinks_the_mean_by_how_alike_they_are() -> None:
    close(call("model_stock", DELTAS).ravel(), stock(stacked(DELTAS).reshape(4, -1)))


def test_model_stock_filter_wise_is_that_of_every_row() -> None:
    expected = np.stack([stock(rows) for rows in stacked(DELTAS).transpose(1, 0, 2)])
    close(call("model_stock", DELTAS, filter_wise=True), expected)


def test_model_stock_of_equal_models_is_the_model_and_of_orthogonal_ones_the_base() -> None:
    close(call("model_stock", [DELTAS[0]] * 3), DELTAS[0].numpy())
    assert not call("model_stock", [torch.tensor([1.0, 0]), torch.tensor([0, 1.0])]).any()


def test_model_stock_of_opposed_models_is_the_base() -> None:
    nearly = [torch.tensor([1.0, 0.1]), torch.tensor([-1.0, 0.1])]
    assert not call("model_stock", nearly).any()


def distances(points: Floats, place: Floats) -> float:
    return float(np.linalg.norm((points - place).reshape(len(points), -1), axis=1).sum())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 8))
def test_no_step_from_the_geometric_median_is_downhill(seed: int, count: int, size: int) -> None:
    random = torch.Generator().manual_seed(seed)
    points = [torch.randn(size, generator=random) for _ in range(count)]
    found, exact = call("geometric_median", points).astype(np.float64), stacked(points)
    reached = distances(exact, found)
    steps = np.random.default_rng(seed).standard_normal((50, size))
    for step in [*steps, *(exact - found)]:
        for length in (1e-1, 1e-2, 1e-3):
            assert distances(exact, found + length * step) > reached - 1e-5 * reached


def test_an_outlier_does_not_move_the_geometric_median_far() -> None:
    points = [torch.tensor([0.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    close(call("geometric_median", points), np.full(2, 0.211325))  # the Fermat point: (1 - 1/sqrt(3)) / 2
    far = call("geometric_median", [*points, torch.tensor([1e6, 1e6])])
    assert np.abs(far).max() < 1


def test_a_point_that_is_the_median_is_returned_as_it_is() -> None:
    points = [torch.tensor([0.0, 0.1]), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])]
    assert call("geometric_median", points).tolist() == points[0].tolist()
    assert (call("geometric_median", [DELTAS[0], DELTAS[1], DELTAS[0]]) == DELTAS[0].numpy()).all()


@pytest.mark.parametrize("count", [2, 3])
def test_between_two_models_it_is_the_mean_and_of_equal_ones_the_model(count: int) -> None:
    close(call("geometric_median", DELTAS[:2]), stacked(DELTAS[:2]).mean(axis=0))
    assert (call("geometric_median", [DELTAS[0]] * count) == DELTAS[0].numpy()).all()
