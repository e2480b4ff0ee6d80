"""ties, dare, della and breadcrumbs against float64 numpy, by their counts, and on average."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mergetool import methods
from mergetool.methods import Site, sparsity
from mergetool.ops.reductions import BLOCK
from tests.methods.parity.case import SITE, tensors

Floats = np.ndarray


def call(name: str, deltas: list[Tensor], site: Site = SITE, **parameters: object) -> Floats:
    function = methods.find(name).function
    assert function is not None
    return function([delta.clone() for delta in deltas], site, **parameters).numpy()


def stacked(deltas: list[Tensor]) -> Floats:
    return np.stack([delta.numpy().astype(np.float64) for delta in deltas])


def thinned(delta: Floats, ranks: slice) -> Floats:
    """The delta with only the elements of those ranks, 0 the largest magnitude."""
    order = np.argsort(-np.abs(delta), axis=None, kind="stable")[ranks]
    kept = np.zeros(delta.size)
    kept[order] = delta.flat[order]
    return kept.reshape(delta.shape)


def elected_mean(deltas: Floats, weights: Floats, *, count: bool = False, divide: bool = True) -> Floats:
    weights = weights.reshape(-1, *[1] * (deltas.ndim - 1))
    weighted = weights * deltas
    sign = np.sign((np.sign(weighted) if count else weighted).sum(axis=0))
    agrees = (np.sign(weighted) == sign) & (sign != 0)
    whole = (np.abs(weights) * agrees).sum(axis=0)
    return (weighted * agrees).sum(axis=0) / np.where(divide & (whole > 0), whole, 1)


def close(found: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


DELTAS = tensors("deltas", 4, (31, 17))
WEIGHTS = (1, -0.5, 2, 0.25)


# ---- ties


@pytest.mark.parametrize("count", [False, True])
@pytest.mark.parametrize("divide", [False, True])
def test_ties_is_trim_elect_and_mean(count: bool, divide: bool) -> None:
    kept = np.stack([thinned(delta, slice(0, round(0.4 * delta.size))) for delta in stacked(DELTAS)])
    how = {"elect": "count" if count else "sum", "normalize": divide}
    found = call("ties", DELTAS, density=0.4, weights=WEIGHTS, scale=1.5, **how)
    close(found, 1.5 * elected_mean(kept, np.array(WEIGHTS), count=count, divide=divide))


def test_ties_keeps_a_fifth_where_nothing_is_said() -> None:
    assert np.count_nonzero(call("ties", DELTAS[:1])) == round(0.2 * 31 * 17)


def test_ties_of_one_whole_difference_is_that_difference() -> None:
    assert (call("ties", DELTAS[:1], density=1) == DELTAS[0].numpy()).all()


def test_a_weight_of_zero_is_a_weight() -> None:
    without = call("ties", DELTAS[1:], density=0.5)
    assert (call("ties", DELTAS, density=0.5, weights=(0, 1, 1, 1)) == without).all()


def test_where_signs_are_balanced_nothing_is_elected() -> None:
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-1.0, -5.0, 3.0])
    assert call("ties", [first, second], density=1).tolist() == [0, -5, 3]
    assert call("ties", [first, second], density=1, elect="count").tolist() == [0, 0, 3]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.05, 1))
def test_ties_of_the_opposites_is_the_opposite(seed: int, count: int, density: float) -> None:
    random = torch.Generator().manual_seed(seed)
    deltas = [torch.randint(-3, 4, (23,), generator=random).float() for _ in range(count)]
    found = call("ties", [-delta for delta in deltas], density=density)
    assert (found == -call("ties", deltas, density=density)).all()


@settings(max_examples=40, deadline=None)
@given(st.permutations(range(4)), st.sampled_from([-4.0, 0.125, 2.0]))
def test_ties_does_not_mind_the_order_and_scales_with_its_input(order: list[int], factor: float) -> None:
    found = call("ties", [DELTAS[i] * factor for i in order], density=0.3)
    close(found, factor * call("ties", DELTAS, density=0.3))


# ---- exactly so many


@pytest.mark.parametrize(("density", "kept"), [(0.29, 29), (0.0, 0), (0.001, 1), (1.0, 100), (0.5, 50)])
def test_exactly_the_share_is_kept_also_of_equal_elements(density: float, kept: int) -> None:
    for values in (torch.ones(10, 10), torch.arange(1.0, 101.0)):
        delta = values.clone()
        sparsity.trim(delta, density)
        assert int(delta.count_nonzero()) == kept


def test_breadcrumbs_leaves_out_the_largest_and_the_smallest() -> None:
    delta = torch.tensor([-9.0, 1.0, -3.0, 8.0, 2.0, 0.5, 4.0, -5.0, 7.0, 6.0])
    assert call("breadcrumbs", [delta], density=0.4, gamma=0.2).tolist() == [0, 0, 0, 0, 0, 0, 4, -5, 7, 6]


def test_breadcrumbs_keeps_its_density_before_it_drops_outliers() -> None:
    delta = torch.arange(1.0, 11.0)
    assert call("breadcrumbs", [delta], density=0.9, gamma=0.3).tolist() == [*range(1, 10), 0]
    assert call("breadcrumbs", [delta], density=1, gamma=0.3).tolist() == list(range(1, 11))


def test_breadcrumbs_ties_votes_on_what_is_left() -> None:
    size = 31 * 17
    places = slice(round(0.1 * size), round(0.1 * size) + round(0.4 * size))
    kept = np.stack([thinned(delta, places) for delta in stacked(DELTAS)])
    found = call("breadcrumbs_ties", DELTAS, density=0.4, gamma=0.1, weights=WEIGHTS)
    close(found, elected_mean(kept, np.array(WEIGHTS), divide=False))


# ---- at random


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties", "della_linear", "della", "dropout"])
def test_the_mean_of_many_draws_is_the_difference(name: str) -> None:
    row = torch.linspace(-1, 1, 40)
    drawn = call(name, [row.repeat(20_000, 1)], density=0.4)
    assert np.abs(drawn.mean(axis=0) - row.numpy()).max() < 0.04  # 5 standard deviations of 1.22 / sqrt(20,000)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "dropout"])
def test_no_two_parameters_arguments_or_seeds_share_a_mask(name: str) -> None:
    ones = torch.ones(64, 64)
    masks = [call(name, [ones], Site(part), density=0.5, seed=seed) for part in ("a", "b") for seed in (0, 1)]
    masks.append(call(name, [torch.zeros(64, 64), ones], Site("a"), density=0.5))
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            assert 0.4 < ((mask != 0) == (other != 0)).mean() < 0.6
    assert (masks[0] == call(name, [ones], Site("a"), density=0.5)).all()


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "dropout"])
def test_no_part_of_a_large_parameter_repeats_the_mask_of_another(name: str) -> None:
    first, second = np.split(call(name, [torch.ones(1024, 512)], density=0.5) != 0, 2)
    assert first.size == BLOCK
    assert 0.45 < (first == second).mean() < 0.55


def test_sd_mecha_gives_equal_shapes_one_mask() -> None:
    from tests.methods.parity.peers import mecha

    layers = [mecha("dropout", probability=0.5, seed=3).call([torch.ones(64, 64)]) for _ in range(2)]
    assert torch.equal(*layers)


def test_what_dare_keeps_is_divided_by_the_density() -> None:
    found = call("dare_linear", [torch.ones(100, 100)], density=0.2)
    assert set(np.unique(found)) == {0, np.float32(5)}
    assert abs(np.count_nonzero(found) - 2000) < 5 * 40
    assert set(np.unique(call("dare_linear", [torch.ones(100, 100)], density=0.2, rescale=False))) == {0, 1}


def test_della_keeps_large_elements_of_a_row_more_often() -> None:
    row = torch.tensor([3.0, -1.0, 2.0, -5.0, 4.0])
    kept = call("della_linear", [row.repeat(40_000, 1)], density=0.5, epsilon=0.4, rescale=False) != 0
    assert np.abs(kept.mean(axis=0) - [0.5, 0.1, 0.3, 0.9, 0.7]).max() < 0.0125  # 5 standard deviations


def test_della_ranks_equal_elements_in_their_order() -> None:
    kept = call("della_linear", [torch.ones(40_000, 3)], density=0.5, epsilon=0.4, rescale=False)
    assert np.abs(kept.mean(axis=0) - [0.1, 0.5, 0.9]).max() < 0.0125


def test_della_narrows_its_probabilities_to_fit() -> None:
    row = torch.tensor([1.0, 2.0, 3.0])
    kept = call("della_linear", [row.repeat(40_000, 1)], density=0.9, epsilon=0.5, rescale=False) != 0
    assert np.abs(kept.mean(axis=0) - [0.8, 0.9, 1.0]).max() < 0.0125


def test_dare_ties_votes_on_what_is_left() -> None:
    kept = stacked(
        [torch.from_numpy(call("dare_linear", [torch.zeros(31, 17)] * k + [DELTAS[k]], density=0.5)) for k in range(4)]
    )
    close(call("dare_ties", DELTAS, density=0.5), elected_mean(kept, np.ones(4), divide=False))


def test_della_averages_what_is_left_and_agrees() -> None:
    kept = stacked([torch.from_numpy(call("della_linear", [torch.zeros(31, 17)] * k + [DELTAS[k]])) for k in range(4)])
    close(call("della", DELTAS, weights=WEIGHTS), elected_mean(kept, np.array(WEIGHTS)))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear", "breadcrumbs"])
def test_density_one_is_the_weighted_sum(name: str) -> None:
    expected = (np.array(WEIGHTS).reshape(-1, 1, 1) * stacked(DELTAS)).sum(axis=0)
    close(call(name, DELTAS, density=1, weights=WEIGHTS, scale=0.5), 0.5 * expected)


# ---- large parameters


@pytest.mark.long
@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
def test_exact_counts_beyond_what_quantile_takes(name: str) -> None:
    delta = torch.randn(4100, 4100, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    assert delta.numel() > 2**24
    found = call(name, [delta], density=0.29, **({"gamma": 0.01} if name == "breadcrumbs" else {}))
    assert np.count_nonzero(found) == round(0.29 * 4100 * 4100)
