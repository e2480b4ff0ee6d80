"""Factors against dense float64 matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergetool.lowrank.low_rank import LowRank

SHAPES = [(40, 30, 7), (30, 40, 7), (12, 9, 20), (9, 12, 20), (1, 5, 2), (64, 64, 64)]


def made(rows: int, columns: int, width: int, seed: int = 0) -> LowRank:
    random = np.random.default_rng(seed)
    up, down = random.standard_normal((rows, width)), random.standard_normal((width, columns))
    return LowRank(torch.from_numpy(up), torch.from_numpy(down))


def dense(one: LowRank) -> np.ndarray:
    return one.up.numpy() @ one.down.numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_that_of_the_dense_matrix(shape: tuple[int, int, int]) -> None:
    one = made(*shape)
    exact = np.linalg.svd(dense(one), compute_uv=False)[: min(shape)]
    np.testing.assert_allclose(one.spectrum().numpy(), exact, rtol=1e-10)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_a_truncation_is_the_best_of_its_rank(shape: tuple[int, int, int], rank: int) -> None:
    one = made(*shape)
    left, values, right = np.linalg.svd(dense(one), full_matrices=False)
    found = one.truncated(rank, name="w")
    product = (found.left.double() * found.singular_values @ found.right.double()).numpy()
    assert found.rank == rank
    np.testing.assert_allclose(product, (left[:, :rank] * values[:rank]) @ right[:rank], atol=1e-6 * values[0])
    assert found.lost_energy == pytest.approx((values[rank:] ** 2).sum(), rel=1e-9)
    assert found.total_energy == pytest.approx((values**2).sum(), rel=1e-9)


def test_vectors_are_orthonormal_and_their_signs_fixed() -> None:
    found = made(50, 40, 8).truncated(5, name="w")
    np.testing.assert_allclose((found.left.T @ found.left).numpy(), np.eye(5), atol=1e-6)
    np.testing.assert_allclose((found.right @ found.right.T).numpy(), np.eye(5), atol=1e-6)
    assert all(float(column[column.abs().argmax()]) > 0 for column in found.left.T)


def test_a_rank_may_be_chosen_from_the_spectrum() -> None:
    one = made(50, 40, 8)
    seen: list[int] = []

    def half(values: torch.Tensor) -> int:
        seen.append(len(values))
        return len(values) // 2

    assert (one.truncated(half, name="w").rank, seen) == (4, [8])


def test_a_sum_is_the_sum_of_the_dense_matrices_with_their_strengths() -> None:
    one, other = made(30, 20, 4), made(30, 20, 6, seed=1)
    whole = LowRank.sum([(0.8, one), (-0.3, other)])
    assert whole.width == 10
    np.testing.assert_allclose(dense(whole), 0.8 * dense(one) - 0.3 * dense(other), atol=1e-12)


def test_inner_products_and_norms_are_those_of_all_elements() -> None:
    one, other = made(30, 20, 4), made(30, 20, 6, seed=1)
    assert one.inner(other) == pytest.approx((dense(one) * dense(other)).sum(), rel=1e-10)
    assert one.norm() == pytest.approx(np.linalg.norm(dense(one)), rel=1e-12)


def test_a_sum_that_cancels_has_no_directions_and_no_norm() -> None:
    one = made(30, 20, 4)
    nothing = LowRank.sum([(1, one), (-1, one)])
    assert nothing.norm() < 1e-12 * one.norm()
    assert (len(nothing.spectrum()), nothing.truncated(3, name="w").rank) == (0, 0)


def test_the_same_factors_twice_have_their_rank_once() -> None:
    one = made(30, 20, 4)
    assert len(LowRank.sum([(1, one), (2, one)]).spectrum()) == 4


def test_factors_of_very_different_sizes_lose_no_direction() -> None:
    scales = torch.tensor([1e12, 1.0, 1e-12], dtype=torch.float64)
    one = made(30, 20, 3)
    skewed = LowRank(one.up * scales, one.down / scales[:, None])
    np.testing.assert_allclose(skewed.spectrum().numpy(), one.spectrum().numpy(), rtol=1e-6)


def test_no_width_is_a_matrix_of_zeros() -> None:
    nothing = LowRank(torch.zeros(5, 0, dtype=torch.float64), torch.zeros(0, 4, dtype=torch.float64))
    found = nothing.truncated(2, name="w")
    assert (found.rank, found.total_energy, found.left.shape, found.right.shape) == (0, 0.0, (5, 0), (0, 4))


def test_narrow_factors_are_widened_exactly_and_the_scale_is_not_rounded() -> None:
    up, down = torch.randn(6, 2).bfloat16(), torch.randn(2, 5).bfloat16()
    one = LowRank.scaled(up, down, 0.1)
    assert torch.equal(one.up, up.double() * 0.1)
    assert torch.equal(one.down, down.double())
