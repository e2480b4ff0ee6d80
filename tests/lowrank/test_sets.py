"""Common, unique and orthogonal parts of two deltas, and their interference, against dense float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergetool.lowrank import sets
from mergetool.lowrank.low_rank import LowRank

M, N = 96, 60


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def pair(rank: int, seed: int, m: int = M, n: int = N) -> LowRank:
    return LowRank(gaussian(m, rank, seed=seed), gaussian(rank, n, seed=seed + 1000))


def dense(delta: sets.Delta) -> np.ndarray:
    return (delta.dense() if isinstance(delta, LowRank) else delta.double()).numpy()


def rotation(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(gaussian(size, size, seed=seed))[0]


def error(found: sets.Delta, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(dense(found) - wanted) / np.linalg.norm(wanted))


def by_definition(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The definition of the module's head, with dense projections and the angles from scipy's convention, in numpy."""

    def operator(one: np.ndarray, two: np.ndarray) -> np.ndarray:
        total = np.zeros((len(one), len(one)))
        x, cosines, y = np.linalg.svd(one.T @ two)
        for k, cosine in enumerate(cosines):
            middle = one @ x[:, k] + two @ y[k]
            middle /= np.linalg.norm(middle)
            total += cosine**2 * np.outer(middle, middle)
        return total

    def thin(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        u, s, v = np.linalg.svd(delta)
        rank = int((s > 1e-9 * s[0]).sum())
        return u[:, :rank], v[:rank].T

    (u1, v1), (u2, v2) = thin(first), thin(second)
    left, right = operator(u1, u2), operator(v1, v2)
    a, b = np.linalg.norm(left @ first @ right), np.linalg.norm(left @ second @ right)
    return 2 * min(a, b) / (a + b) * left @ (first + second) @ right / 2


def test_pairs_and_dense_deltas_have_the_common_part_of_the_definition() -> None:
    shared = pair(3, seed=1)
    one = sets.combined([(1.0, shared), (1.0, pair(4, seed=2))])
    two = sets.combined([(0.6, shared), (1.0, pair(2, seed=3))])
    wanted = by_definition(dense(one), dense(two))
    assert error(sets.common(one, two), wanted) < 1e-10
    as_tensors = torch.from_numpy(dense(one)), torch.from_numpy(dense(two))
    assert error(sets.common(*as_tensors), wanted) < 1e-10
    assert error(sets.common(as_tensors[0], two), wanted) < 1e-10


def test_a_delta_is_common_to_itself_whole() -> None:
    delta = pair(7, seed=4)
    assert error(sets.common(delta, delta), dense(delta)) < 1e-12
    full = gaussian(M, N, seed=5)
    assert error(sets.common(full, full), full.numpy()) < 1e-12


def test_nothing_is_common_with_zero_or_with_the_opposite() -> None:
    delta = pair(5, seed=6)
    assert np.abs(dense(sets.common(delta, LowRank(torch.zeros(M, 2), torch.zeros(2, N))))).max() == 0
    assert np.abs(dense(sets.common(delta, LowRank(torch.zeros(M, 0), torch.zeros(0, N))))).max() == 0
    opposite = LowRank(-delta.up, delta.down)
    assert np.abs(dense(sets.common(delta, opposite))).max() < 1e-12


@pytest.mark.parametrize("side", ["columns", "rows", "both"])
def test_nothing_is_common_to_deltas_in_orthogonal_subspaces(side: str) -> None:
    left, right = rotation(M, seed=7), rotation(N, seed=8)
    rows = right if side != "columns" else torch.cat([right[:, :4], right[:, :4]], dim=1)
    columns = left if side != "rows" else torch.cat([left[:, :4], left[:, :4]], dim=1)
    one, two = LowRank(columns[:, :4], rows[:, :4].T), LowRank(columns[:, 4:8], rows[:, 4:8].T)
    assert np.abs(dense(sets.common(one, two))).max() < 1e-12


def test_the_common_part_does_not_depend_on_the_order() -> None:
    one, two = pair(6, seed=9), pair(3, seed=10)
    assert error(sets.common(one, two), dense(sets.common(two, one))) < 1e-12


def test_the_common_part_turns_with_the_deltas() -> None:
    one = sets.combined([(1.0, pair(3, seed=1)), (1.0, pair(4, seed=2))])
    two = sets.combined([(0.6, pair(3, seed=1)), (1.0, pair(2, seed=3))])
    assert isinstance(one, LowRank)
    assert isinstance(two, LowRank)
    g, h = rotation(M, seed=11), rotation(N, seed=12)
    turned = sets.common(LowRank(g @ one.up, one.down @ h), LowRank(g @ two.up, two.down @ h))
    assert error(turned, (g @ sets.common(one, two).dense() @ h).numpy()) < 1e-10


@pytest.mark.parametrize("strength", [1e-6, 0.3, 1.0, 40.0])
def test_of_a_delta_at_two_strengths_the_weaker_one_is_common(strength: float) -> None:
    delta = pair(5, seed=13)
    other = LowRank(delta.up * strength, delta.down)
    assert error(sets.common(delta, other), min(strength, 1) * dense(delta)) < 1e-12


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.1, -0.3])
def test_the_common_part_is_no_larger_than_the_smaller_delta(strength: float) -> None:
    one = pair(5, seed=14)
    two = sets.combined([(strength, one), (0.1, pair(2, seed=15))])
    smaller = min(np.linalg.norm(dense(one)), np.linalg.norm(dense(two)))
    assert np.linalg.norm(dense(sets.common(one, two))) <= smaller * (1 + 1e-12)


def test_a_shared_part_beside_orthogonal_private_ones_is_found_exactly() -> None:
    left, right = rotation(M, seed=16), rotation(N, seed=17)

    def block(start: int, end: int, seed: int) -> LowRank:
        return LowRank(left[:, start:end] @ gaussian(end - start, end - start, seed=seed), right[:, start:end].T)

    shared, first, second = block(0, 3, 18), block(3, 8, 19), block(8, 10, 20)
    one, two = (sets.combined([(1.0, shared), (1.0, own)]) for own in (first, second))
    found = sets.common(one, two)
    assert error(found, dense(shared)) < 1e-12
    assert error(sets.unique(one, found), dense(first)) < 1e-12
    assert error(sets.unique(two, found), dense(second)) < 1e-12
    assert error(sets.union(one, two), dense(shared) + dense(first) + dense(second)) < 1e-12


def test_a_shared_part_beside_random_private_ones_is_nearly_found() -> None:
    m, n = 1024, 768
    shared, first, second = pair(4, 21, m, n), pair(8, 22, m, n), pair(8, 23, m, n)
    one, two = (sets.combined([(1.0, shared), (1.0, own)]) for own in (first, second))
    assert error(sets.common(one, two), dense(shared)) < 0.04


def test_the_rank_is_at_most_the_smaller_one() -> None:
    assert sets.common(pair(9, seed=24), pair(3, seed=25)).width == 3


def test_directions_of_a_pair_are_those_of_its_product() -> None:
    delta = pair(6, seed=26)
    doubled = LowRank(torch.cat([delta.up, delta.up], 1), torch.cat([delta.down, delta.down]))
    found = sets.directions(doubled)
    assert len(found.values) == 6
    np.testing.assert_allclose(found.values, np.linalg.svd(2 * dense(delta), compute_uv=False)[:6], rtol=1e-12)
    assert error((found.left * found.values) @ found.right, 2 * dense(delta)) < 1e-12


def test_union_weighs_the_unique_parts_only() -> None:
    one, two = pair(5, seed=27), sets.combined([(1.0, pair(5, seed=27)), (1.0, pair(2, seed=28))])
    shared = dense(sets.common(one, two))
    wanted = shared + 0.25 * (dense(one) - shared) + 2 * (dense(two) - shared)
    assert error(sets.union(one, two, (0.25, 2.0)), wanted) < 1e-12
    tensors = torch.from_numpy(dense(one)), torch.from_numpy(dense(two))
    assert error(sets.union(*tensors, (0.25, 2.0)), wanted) < 1e-10


@pytest.mark.parametrize("kind", ["pairs", "dense", "mixed"])
def test_the_orthogonal_part_is_orthogonal_and_the_rest_is_parallel(kind: str) -> None:
    one, two = sets.combined([(1.0, pair(4, seed=29)), (0.5, pair(3, seed=30))]), pair(3, seed=30)
    first: sets.Delta = one if kind == "pairs" else torch.from_numpy(dense(one))
    second: sets.Delta = torch.from_numpy(dense(two)) if kind == "dense" else two
    found = dense(sets.orthogonal_part(first, second))
    assert abs((found * dense(two)).sum()) < 1e-9 * np.linalg.norm(found) * np.linalg.norm(dense(two))
    removed = dense(one) - found
    factor = (dense(one) * dense(two)).sum() / (dense(two) ** 2).sum()
    np.testing.assert_allclose(removed, factor * dense(two), atol=1e-10)


def test_the_orthogonal_part_to_zero_is_the_delta() -> None:
    one = pair(4, seed=31)
    assert error(sets.orthogonal_part(one, LowRank(torch.zeros(M, 1), torch.zeros(1, N))), dense(one)) == 0


def test_interference_is_what_dense_projections_say() -> None:
    one = sets.combined([(1.0, pair(4, seed=32)), (0.7, pair(3, seed=33))])
    two = sets.combined([(1.0, pair(3, seed=33)), (1.0, pair(2, seed=34))])
    a, b = dense(one), dense(two)
    u, s, v = np.linalg.svd(b)
    rank = int((s > 1e-9 * s[0]).sum())
    columns, rows = u[:, :rank] @ u[:, :rank].T, v[:rank].T @ v[:rank]
    energy = np.linalg.norm(a) ** 2
    found = sets.interference(one, two, signs=True)
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.column_share == pytest.approx(np.linalg.norm(columns @ a) ** 2 / energy)
    assert found.row_share == pytest.approx(np.linalg.norm(a @ rows) ** 2 / energy)
    assert found.both_share == pytest.approx(np.linalg.norm(columns @ a @ rows) ** 2 / energy)
    assert found.opposing == pytest.approx(-np.minimum(a * b, 0).sum() / np.abs(a * b).sum())


def test_interference_of_equal_opposite_and_absent_deltas() -> None:
    one = pair(4, seed=35)
    same = sets.interference(one, one, signs=True)
    assert (same.cosine, same.column_share, same.opposing) == (pytest.approx(1), pytest.approx(1), 0)
    against = sets.interference(one, LowRank(-one.up, one.down), signs=True)
    assert (against.cosine, against.row_share, against.opposing) == (pytest.approx(-1), pytest.approx(1), 1)
    nothing = sets.interference(one, LowRank(torch.zeros(M, 0), torch.zeros(0, N)))
    assert (nothing.cosine, nothing.both_share, nothing.opposing) == (0, 0, None)


def test_signs_are_counted_over_all_rows() -> None:
    one, two = pair(2, seed=36, m=700, n=20), pair(2, seed=37, m=700, n=20)
    product = dense(one) * dense(two)
    found = sets.interference(one, two, signs=True).opposing
    assert found == pytest.approx(-np.minimum(product, 0).sum() / np.abs(product).sum())


def test_values_far_from_one_do_not_matter() -> None:
    one, two = pair(4, seed=38), sets.combined([(1.0, pair(4, seed=38)), (1.0, pair(2, seed=39))])
    wanted = dense(sets.common(one, two))
    assert isinstance(two, LowRank)
    for size in (1e-35, 1e35):  # of both factors, as small and as large as float32 holds them
        found = sets.common(LowRank(one.up * size, one.down * size), LowRank(two.up * size, two.down * size))
        assert error(LowRank(found.up / size, found.down / size), wanted) < 1e-10


def test_deltas_of_different_shapes_are_refused() -> None:
    for work in (sets.common, sets.interference, sets.orthogonal_part):
        with pytest.raises(ValueError, match="not of one matrix"):
            work(pair(2, seed=40), pair(2, seed=41, n=N + 1))
    with pytest.raises(ValueError, match="no product"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 4))
