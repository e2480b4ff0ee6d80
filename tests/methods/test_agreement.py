"""sce, ram and dropout against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.methods.parity.case import tensors
from tests.methods.test_sparse import call, close, stacked

DELTAS = tensors("deltas", 4, (31, 17))


@pytest.mark.parametrize("density", [1.0, 0.3])
def test_sce_selects_by_variance_weighs_by_energy_and_erases_the_minority(density: float) -> None:
    d = stacked(DELTAS)
    chosen = np.zeros(d[0].size, bool)
    chosen[np.argsort(-d.var(axis=0), axis=None, kind="stable")[: round(density * d[0].size)]] = True
    d *= chosen.reshape(d[0].shape)
    energy = (d**2).sum(axis=(1, 2), keepdims=True)
    agrees = np.sign(d) == np.sign(d.sum(axis=0))
    close(call("sce", DELTAS, density=density), (energy * d * agrees).sum(axis=0) / (energy * agrees).sum(axis=0))


def test_sce_weighs_small_differences_as_it_weighs_large_ones() -> None:
    close(call("sce", [delta * 2.0**-20 for delta in DELTAS]), call("sce", DELTAS) * 2.0**-20)


def test_sce_chooses_among_the_elements_that_differ() -> None:
    first = torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0, 1.0])
    second = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    assert np.nonzero(call("sce", [first, second], density=0.67))[0].tolist() == [4, 5]


def test_ram_averages_over_those_that_changed_an_element() -> None:
    deltas = [torch.tensor([1.0, 0, 0, 0.5]), torch.tensor([3.0, 4.0, 0, -0.1]), torch.tensor([0, 0, 0.1, 0.7])]
    assert call("ram", deltas, epsilon=0.2).tolist() == pytest.approx([2, 4, 0, 0.6])


def test_ramplus_strengthens_what_one_changed_alone() -> None:
    deltas = [torch.tensor([1.0, 2.0, 0, 0]), torch.tensor([3.0, 0, 4.0, 8.0])]  # one shared; one and two alone
    found = call("ramplus_tl", deltas, r=0.5, alpha=0.75)
    assert found.tolist() == pytest.approx([2, 2 * (1 + 0.5 * 0.75), 4 * (1 + 0.5 * 0.5), 8 * (1 + 0.5 * 0.5)])


@pytest.mark.parametrize("overlap", ["independent", "exclusive"])
def test_dropout_is_the_mean_on_average(overlap: str) -> None:
    rows = [torch.linspace(-1, 1, 20), torch.linspace(2, 1, 20), torch.linspace(0, 3, 20)]
    found = call("dropout", [row.repeat(30_000, 1) for row in rows], density=0.3, overlap=overlap)
    assert np.abs(found.mean(axis=0) - stacked(rows).mean(axis=0)).max() < 0.09  # 5 standard deviations of at most 3


def test_exclusive_dropout_never_mixes_and_keeps_the_density() -> None:
    found = call("dropout", [torch.full((300, 300), value) for value in (1.0, 10.0)], density=0.5, overlap="exclusive")
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == [0, 2, 20]
    assert (np.abs(counts / found.size - [0.5, 0.25, 0.25]) < 0.01).all()
