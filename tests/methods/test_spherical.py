"""Interpolation on spheres, against rotations and means computed in float64."""

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


def flat(tensor: Tensor | np.ndarray) -> np.ndarray:
    return np.asarray(tensor, np.float64).reshape(-1)


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * np.arctan2(np.linalg.norm(unit(a) - unit(b)), np.linalg.norm(unit(a) + unit(b)))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["models", "deltas"])
def test_slerp_turns_at_an_even_rate(kind: str, t: float) -> None:
    a, b = tensors(kind, 2, (30, 20))
    found = flat(call("slerp", [a, b], t=t, sizes="line"))
    whole = angle(flat(a), flat(b))
    assert angle(found, flat(a)) == pytest.approx(t * whole, abs=1e-7)
    assert angle(found, flat(b)) == pytest.approx((1 - t) * whole, abs=1e-7)
    size = (1 - t) * np.linalg.norm(a) + t * np.linalg.norm(b)
    assert np.linalg.norm(found) == pytest.approx(size, rel=1e-6)


def test_slerp_goes_the_arc_where_mergekit_takes_the_line() -> None:
    a = torch.zeros(2, 1)
    b = a.clone()
    a[0, 0], b[0, 0], b[1, 0] = 1.0, np.cos(0.02), np.sin(0.02)
    found = call("slerp", [a, b])
    np.testing.assert_allclose(found[:, 0], [np.cos(0.01), np.sin(0.01)], atol=1e-7)
    assert np.linalg.norm(found) > np.linalg.norm((a + b) / 2) + 4e-5


def test_opposite_vectors_meet_on_the_line() -> None:
    a = torch.randn(20, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(call("slerp", [a, -a], t=0.25), 0.5 * a.double(), rtol=1e-6)


@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize("shape", [(12, 7), (4, 6, 3, 3), (9,)])
def test_nuslerp_turns_every_vector_by_itself(shape: tuple[int, ...], per: str) -> None:
    a, b = tensors("deltas", 2, shape)
    found = call("nuslerp", [a, b], t=0.3, per=per)
    axis = 0 if per == "row" or len(shape) == 1 else 1
    parts = range(shape[axis]) if len(shape) > 1 else [slice(None)]
    for i in parts:
        x, y = (each.select(axis, i) if len(shape) > 1 else each for each in (a, b))
        got = found.take(i, axis) if len(shape) > 1 else found
        np.testing.assert_allclose(got, call("slerp", [x, y], t=0.3), atol=1e-9)


def test_multislerp_of_two_is_in_the_middle_of_the_arc() -> None:
    a, b = tensors("deltas", 2, (30, 20))
    np.testing.assert_allclose(call("multislerp", [a, b]), call("slerp", [a, b], sizes="line"), atol=1e-9)


def test_multislerp_of_directions_that_cancel_is_the_mean() -> None:
    a, _ = tensors("deltas", 2, (30, 20))
    np.testing.assert_allclose(call("multislerp", [a, -2 * a]), -a.double() / 2, rtol=1e-6)


def test_karcher_pulls_evenly_in_all_directions() -> None:
    weights = (1.0, 0.5, 2.0)
    given = tensors("deltas", 3, (30, 20))
    found = unit(flat(call("karcher", given, weights=weights)))
    pull = np.zeros_like(found)
    for weight, each in zip(weights, given, strict=True):
        across = unit(flat(each)) - found * (found @ unit(flat(each)))
        pull += weight * angle(found, flat(each)) * unit(across)
    assert np.linalg.norm(pull) < 1e-6


@pytest.mark.parametrize("name", ["karcher", "multislerp"])
def test_means_of_directions_depend_on_neither_order_nor_scale(name: str) -> None:
    given = tensors("deltas", 3, (30, 20))
    found = call(name, given)
    np.testing.assert_allclose(call(name, given[::-1]), found, atol=1e-9)
    # mergekit takes arguments with norms below 1e-5 for zero
    np.testing.assert_allclose(call(name, [each * 2.0**-20 for each in given]), found * 2.0**-20, rtol=1e-6)
