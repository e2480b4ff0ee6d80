"""Selections of exactly so many, of any number of elements, against numpy's sort."""

from __future__ import annotations

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
