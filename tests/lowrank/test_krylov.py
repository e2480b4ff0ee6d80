"""Products with a matrix, orthonormal bases, and the block Krylov space that grows out of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergetool.lowrank import krylov
from mergetool.lowrank.krylov import BlockKrylov, Products, orthonormal_rows
from mergetool.lowrank.range_finder import project
from mergetool.lowrank.svd import squared_norm
from tests.lowrank.contract import planted


def test_orthonormal_rows_leave_out_what_is_not_independent() -> None:
    rows = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    basis = orthonormal_rows(torch.cat([rows, rows[:3] * 2, torch.zeros(2, 50, dtype=torch.float64)]))
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(rows @ basis.T @ basis, rows)


def test_orthonormal_rows_of_nearly_dependent_rows() -> None:
    rows = torch.randn(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    basis = orthonormal_rows(rows[:1] + rows * 10.0 ** -torch.arange(6.0, dtype=torch.float64)[:, None])
    torch.testing.assert_close(basis @ basis.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_projection_drops_directions_that_the_delta_does_not_have() -> None:
    delta = planted("low rank").delta
    rows = orthonormal_rows(torch.randn(40, 199, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    assert len(project(Products(delta, delta, squared_norm(delta)), rows).energies) == 5


@pytest.mark.parametrize("lies", ["tall", "wide"])
def test_krylov_energies_rise_to_the_true_ones_from_below(lies: str) -> None:
    known = planted("power law")
    delta = known.delta if lies == "tall" else known.delta.T.contiguous()
    space = BlockKrylov(Products(delta, delta, squared_norm(delta)), torch.Generator().manual_seed(4))
    before = torch.zeros(16, dtype=torch.float64)
    for _ in range(5):
        space.expand(16)
        assert bool((space.energies[:16] >= before * (1 - 1e-6)).all())
        before = space.energies[:16]
    assert bool((before <= torch.from_numpy(known.energies[:16]) * (1 + 1e-6)).all())
    np.testing.assert_allclose(before[:8], known.energies[:8], rtol=1e-3)


def test_krylov_basis_grows_past_an_exhausted_space() -> None:
    # The identity maps every block onto itself: all that is new has to be random.
    delta = torch.eye(60)
    space = BlockKrylov(Products(delta, delta, squared_norm(delta)), torch.Generator().manual_seed(4))
    for _ in range(4):
        space.expand(20)
    assert space.size == 60
    torch.testing.assert_close(space.energies, torch.ones(60, dtype=torch.float64))


def test_cheap_products_are_bf16_only_where_the_processor_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    asked = [flag for flag in ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if hasattr(torch.cpu, flag)]
    for supported in (False, True):
        for flag in asked:
            monkeypatch.setattr(torch.cpu, flag, lambda supported=supported: supported)
        assert krylov.fast_bfloat16.__wrapped__() is supported
