"""Selections of exactly so many, of any number of elements, against numpy's sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetool.ops import reductions

SIZE = 5 * reductions.SAMPLE


def values(kind: str) -> Tensor:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(SIZE, generator=random)
    return {
        "normal": normal,
        "bf16": normal.bfloat16().float(),
        "mostly zero": normal * (torch.rand(SIZE, generator=random) < 0.01),
        "sorted": normal.sort().values,
        "periodic": normal[: SIZE // reductions.SAMPLE].repeat(reductions.SAMPLE),  # what the sample sees is one value
        "equal": torch.ones(SIZE),
    }[kind]


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("count", [1, 2, 1000, SIZE // 3, SIZE - 1, SIZE])
@pytest.mark.parametrize("kind", ["normal", "bf16", "mostly zero", "sorted", "periodic", "equal"])
def test_the_largest_are_those_of_a_sort(kind: str, count: int, magnitude: bool) -> None:
    given = values(kind)
    keys = np.abs(given.numpy()) if magnitude else given.numpy()
    order = np.argsort(-keys, kind="stable")
    assert reductions.kth_largest(given, count, magnitude=magnitude) == keys[order[count - 1]]
    mask = reductions.largest(given, count, magnitude=magnitude).numpy()
    assert np.array_equal(np.nonzero(mask)[0], np.sort(order[:count]))


def test_a_sample_is_enough_for_most() -> None:
    for count in (1, 1000, SIZE // 3, SIZE):
        assert reductions._near(values("normal"), count, True) is not None


@pytest.mark.parametrize("count", [2, 3, 1000])
def test_nan_is_larger_than_any_number(count: int) -> None:
    given = values("normal")
    given[[5, 70_000, 300_000]] = float("nan")
    chosen = reductions.largest(given, count).nonzero().reshape(-1).tolist()
    assert len(chosen) == count
    assert {5, 70_000, 300_000} >= set(chosen) or {5, 70_000, 300_000} <= set(chosen)


def test_random_numbers_can_be_had_in_pieces() -> None:
    cpu = torch.device("cpu")
    whole = reductions.uniform(7, (3, 200_000), cpu)
    pieces = [reductions.uniform(7, (250_000,), cpu, start) for start in (0, 250_000)]
    assert torch.equal(whole.reshape(-1)[:500_000], torch.cat(pieces))


@pytest.mark.long
def test_more_elements_than_quantile_takes() -> None:
    size = 2**24 + 12_345
    given = torch.randn(size, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    with pytest.raises(RuntimeError):
        torch.quantile(given, 0.5)
    for count in (1, 2**24 + 1, size // 5):
        mask = reductions.largest(given, count, magnitude=True)
        assert int(mask.count_nonzero()) == count
        assert given[mask].abs().min() >= given[~mask].abs().max()


SIZES = [0, 1, 7, reductions.BLOCK - 1, reductions.BLOCK, 2 * reductions.BLOCK + 3]


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=random), torch.randn(shape, generator=random) * 100


@pytest.mark.parametrize("size", SIZES)
def test_sums_of_any_size_are_those_of_fsum(size: int) -> None:
    a, b = pair(size)
    products = a.double().numpy() * b.double().numpy()  # exact
    assert reductions.total(a) == pytest.approx(math.fsum(a.tolist()), rel=1e-12, abs=1e-12)
    assert reductions.dot(a, b) == pytest.approx(math.fsum(products.tolist()), rel=1e-12, abs=1e-10)
    assert reductions.norm(a) == pytest.approx(math.sqrt(math.fsum((a.double() ** 2).tolist())), rel=1e-14)


def test_sums_lose_nothing_to_float32() -> None:
    given = torch.full((2**21,), 0.1)
    given[0] = 1e8
    assert reductions.total(given) == pytest.approx(math.fsum(given.tolist()), rel=1e-14)


@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (3, 0), (1, 4), (33, 7), (4, 3, 5), (600, 700)])
def test_rows_and_columns_of_any_shape(shape: tuple[int, ...]) -> None:
    a, b = pair(*shape)
    products = np.atleast_1d(a.double().numpy() * b.double().numpy())
    rows, columns = reductions.row_dots(a, b), reductions.column_dots(a, b)
    assert (rows.shape, columns.shape) == (shape[:-1], shape[1:])
    assert rows.dtype == columns.dtype == torch.float64
    np.testing.assert_allclose(rows.numpy(), products.sum(-1).reshape(shape[:-1]), rtol=1e-11, atol=1e-10)
    np.testing.assert_allclose(columns.numpy(), products.sum(0).reshape(shape[1:]), rtol=1e-11, atol=1e-10)
    np.testing.assert_allclose(reductions.row_norms(a), reductions.row_dots(a, a).sqrt(), rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reductions_change_nothing_they_are_given(dtype: torch.dtype) -> None:
    a, b = (each.to(dtype) for each in pair(40, 30))
    before = a.clone(), b.clone()
    reductions.total(a), reductions.dot(a, b), reductions.row_dots(a, b), reductions.column_dots(a, b)
    reductions.largest(a, 7)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


def test_threads_and_memory_layouts_show_nowhere() -> None:
    a, b = pair(900, 700)
    turned = a.T.contiguous().T, b.T.contiguous().T  # the same values, the other way round in memory
    before = torch.get_num_threads()
    found = []
    try:
        for threads, (x, y) in ((1, (a, b)), (3, (a, b)), (1, turned)):
            torch.set_num_threads(threads)
            found.append(
                (
                    reductions.dot(x, y),
                    reductions.total(x),
                    reductions.row_dots(x, y).tolist(),
                    reductions.column_dots(x, y).tolist(),
                    reductions.largest(x, 1000).tolist(),
                )
            )
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("size", [3, 2 * reductions.BLOCK])
def test_infinities_and_nan_are_passed_on(size: int) -> None:
    given = torch.ones(size)
    given[0], given[-1] = float("inf"), float("-inf")
    assert math.isnan(reductions.total(given))
    assert reductions.dot(given, given) == float("inf")


@pytest.mark.parametrize("count", [0, 6, -1])
def test_there_is_no_kth_largest_outside_the_tensor(count: int) -> None:
    with pytest.raises(ValueError, match=f"no {count}-th largest of 5 elements"):
        reductions.kth_largest(torch.ones(5), count)


def test_of_equal_elements_the_first_are_chosen() -> None:
    given = torch.tensor([[1.0, 2.0, 2.0], [2.0, 0.0, 2.0]])
    assert reductions.largest(given, 3).tolist() == [[False, True, True], [True, False, False]]
    assert reductions.largest(given.T, 2).tolist() == [[False, True], [True, False], [False, False]]
    assert not reductions.largest(given, 0).any()
    assert reductions.largest(given, 99).all()


def test_random_numbers_are_even_and_depend_on_the_key() -> None:
    cpu = torch.device("cpu")
    draws = reductions.uniform(1, (300, 1000), cpu)
    counts = np.histogram(draws.numpy(), bins=100, range=(0, 1))[0]
    assert counts.sum() == 300_000
    assert ((counts - 3000) ** 2 / 3000).sum() < 160  # chi-squared of 99: below it in 99.99 % of draws
    assert (draws * 2**24 == (draws * 2**24).round()).all()
    other = reductions.uniform(2, (300, 1000), cpu)
    assert abs(float(((draws - 0.5) * (other - 0.5)).mean())) < 1e-3
