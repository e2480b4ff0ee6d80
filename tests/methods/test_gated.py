"""Gates and bounds, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetool.methods import Site, find
from tests.methods.parity.case import tensors

SITE = Site("w")


def call(name: str, given: list[Tensor], **parameters: object) -> np.ndarray:
    function = find(name).function
    assert function is not None
    return function([each.clone() for each in given], SITE, **parameters).double().numpy()


def doubles(kind: str, count: int) -> tuple[list[Tensor], list[np.ndarray]]:
    given = tensors(kind, count, (70, 50))
    return given, [each.double().numpy() for each in given]


def near(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-7 * np.abs(expected).max())


def test_nearswap_moves_no_element_further_than_t() -> None:
    given, (a, b) = doubles("models", 2)
    found = call("nearswap", given, t=0.002)
    close = np.abs(b - a) <= 0.002
    assert 100 < close.sum() < 3000
    near(found, np.where(close, b, a + 0.002 * np.sign(b - a)))


def test_cosine_gates_keep_columns_that_agree() -> None:
    given, (a, b) = doubles("models", 2)
    columns = np.array([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in zip(a.T, b.T, strict=True)])
    whole = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    for name, cosines in (("add_cosine_a", columns), ("add_cosine_b", (columns + whole) / 2)):
        k = 1 - np.clip(cosines - 0.3, 0, 1)
        near(call(name, given, alpha=0.3), (1 - k) * a + k * b)


def test_train_difference_moves_most_where_the_models_differ() -> None:
    given, (a, b, c) = doubles("models", 3)
    mask = np.abs(a - b) / (np.abs(a - b) + np.abs(b - c))
    near(call("train_difference", given, alpha=0.5), a + 0.9 * mask * (b - c))
    assert (call("train_difference", [given[0], given[1], given[1]]) == a).all()


def test_arcee_fusion_takes_what_is_above_the_quartiles() -> None:
    given, (a, b) = doubles("models", 2)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) + 1e-8 for x in (b, a))
    importance = np.abs(b - a) * (p * np.log(p / q)).sum(1, keepdims=True)
    order = np.sort(importance.reshape(-1))
    low, middle, high = (order[int(share * (order.size - 1))] for share in (0.25, 0.5, 0.75))
    taken = importance >= middle + 1.5 * (high - low)
    assert 50 < taken.sum() < 700
    near(call("arcee_fusion", given), np.where(taken, b, a))


@pytest.mark.parametrize("stiffness", [0.0, 0.4, 1.0])
def test_clamp_keeps_to_the_range_of_the_others(stiffness: float) -> None:
    given, (a, *others) = doubles("models", 4)
    bounds = np.stack(others)
    mean = bounds.mean(0)
    inner = np.where(bounds >= mean, bounds, np.inf).min(0), np.where(bounds <= mean, bounds, -np.inf).max(0)
    high, low = (
        (1 - stiffness) * x + stiffness * y for x, y in zip((bounds.max(0), bounds.min(0)), inner, strict=True)
    )
    near(call("clamp", given, stiffness=stiffness), np.minimum(np.maximum(a, low), high))


def test_geometric_sum_is_the_real_part_of_complex_powers() -> None:
    given, (a, b) = doubles("models", 2)
    near(call("geometric_sum", given, alpha=0.3), (a.astype(complex) ** 0.7 * b.astype(complex) ** 0.3).real)


def test_multiply_quotient_moves_only_what_moved_in_opposite_directions() -> None:
    a, b, c = torch.tensor([[1.0, 4.0, 1.0, 0.0]]), torch.tensor([[4.0, 4.0, -4.0, 1.0]]), torch.tensor([[2.0] * 4])
    # log2: -1 and 1, so a * (4/2)**1; 1 and 1: a; -1 and 1 with a negative quotient: Re((-2)**1); zero: zero
    np.testing.assert_allclose(call("multiply_quotient", [a, b, c]), [[2.0, 4.0, -2.0, 0.0]], rtol=1e-6)
