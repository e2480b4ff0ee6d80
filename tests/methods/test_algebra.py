"""Projections and truncated decompositions, against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetool.lowrank import exact
from mergetool.methods import Site, find

SITE = Site("w")


def truncated(delta: Tensor, **parameters: object) -> np.ndarray:
    function = find("truncate_rank").function
    assert function is not None
    return function([delta.clone()], SITE, **parameters).numpy()


def matrix(m: int, n: int, values: np.ndarray) -> Tensor:
    rng = np.random.default_rng(m + n)
    left, right = (np.linalg.qr(rng.standard_normal((size, len(values))))[0] for size in (m, n))
    return torch.from_numpy((left * values @ right.T).astype(np.float32))


def strongest(delta: Tensor, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(delta.double().numpy(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


# a falling spectrum; one whose gap at 8 is 2 % only; eight equal values, which a Krylov space may lack copies of
SPECTRA = {
    "falling": 0.01 * 0.9 ** np.arange(500.0),
    "narrow": 0.01 * np.r_[np.full(8, 1.02) + 0.1 * np.arange(8)[::-1], np.ones(492)],
    "repeated": 0.01 * np.r_[np.ones(8), 0.9 * np.ones(492)],
    "tiny": 1e-25 * 0.8 ** np.arange(500.0),
}


@pytest.mark.parametrize("shape", [(700, 520), (520, 700), (520, 520)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_strongest_directions_are_exact_to_float32(spectrum: str, shape: tuple[int, int]) -> None:
    delta = matrix(*shape, SPECTRA[spectrum])
    expected = strongest(delta, 8)
    found = truncated(delta)
    np.testing.assert_allclose(found, expected, rtol=6.1e-8, atol=2e-8 * np.abs(expected).max())


def test_the_search_and_the_whole_spectrum_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = matrix(700, 520, SPECTRA["falling"])
    called: list[int] = []
    searching = exact._refined
    monkeypatch.setattr(exact, "_refined", lambda *given: called.append(1) or searching(*given))
    searched = truncated(delta)
    assert called
    monkeypatch.setattr(exact, "SMALL", 10_000)
    np.testing.assert_allclose(truncated(delta), searched, rtol=0, atol=1.2e-7 * np.abs(searched).max())
    assert called == [1]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.999])
def test_energy_keeps_the_fewest_directions_that_hold_it(share: float) -> None:
    delta = matrix(700, 520, SPECTRA["falling"])
    squares = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    rank = int(np.searchsorted(np.cumsum(squares), share * squares.sum())) + 1
    expected = strongest(delta, rank)
    found = truncated(delta, rank=0, energy=share)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7 * np.abs(expected).max())
    np.testing.assert_allclose(truncated(delta, rank=3, energy=share), strongest(delta, 3), rtol=0, atol=2e-9)


def test_bytes_do_not_depend_on_threads() -> None:
    delta = matrix(700, 520, SPECTRA["falling"])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = truncated(delta)
        torch.set_num_threads(2)
        assert (truncated(delta) == one).all()
    finally:
        torch.set_num_threads(before)


def test_kernels_are_matrices_of_their_outputs() -> None:
    delta = torch.randn(12, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = strongest(delta.flatten(1), 2).reshape(delta.shape)
    np.testing.assert_allclose(truncated(delta, rank=2), expected, atol=3e-7)


def test_what_has_no_more_directions_stays_as_it_is() -> None:
    for delta in (torch.randn(9), torch.randn(3, 4), torch.zeros(20, 20), torch.randn(0, 4)):
        assert (truncated(delta) == delta.numpy()).all()
    delta = torch.randn(30, 20)
    assert (truncated(delta, rank=0) == delta.numpy()).all()


def test_the_perpendicular_part_and_the_rest_are_the_first_difference() -> None:
    function = find("perpendicular").function
    assert function is not None
    a, b = (0.01 * torch.randn(60, 40, generator=torch.Generator().manual_seed(seed)) + 0.004 for seed in (1, 2))
    found = function([a.clone(), b.clone()], SITE).double().numpy()
    x, y = a.double().numpy(), b.double().numpy()
    np.testing.assert_allclose(found, x - y * (x * y).sum() / (y * y).sum(), rtol=0, atol=1e-8)
    assert abs((found * y).sum()) < 1e-7 * np.linalg.norm(x) * np.linalg.norm(y)
    assert not function([a.clone(), a.clone()], SITE).any()
    assert torch.equal(function([a.clone(), torch.zeros_like(a)], SITE), a)
