"""The CPU's decomposition and its parts, the factors that are stored, and what is said of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetool.errors import NonFiniteError
from mergetool.lowrank import svd
from mergetool.lowrank.balanced import balanced, stored_residual
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.low_rank import LowRank
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.svd import decompose
from tests.lowrank.contract import (
    SPECTRA,
    DecompositionContract,
    Float64,
    Planted,
    dense,
    planted,
    relative_distance,
    true_energy,
    with_spectrum,
)


class TestDecompose(DecompositionContract):
    def decompose(self, delta: Tensor, *, name: str, sketch: Tensor | None = None, **options: Any) -> Decomposition:
        return decompose(delta, name=name, sketch=sketch, **options)  # type: ignore[arg-type]


def test_low_rank_delta_takes_few_passes_and_flat_one_the_whole_spectrum() -> None:
    delta = with_spectrum(1500, 1000, 0.8 ** np.arange(12.0), noise=0.01)
    quick = decompose(delta, name="w", rule=Rule(threshold=0.95))
    assert (quick.method, quick.passes <= 12) == ("krylov", True)
    assert decompose(planted("flat").delta, name="w", rule=Rule(threshold=0.9)).method == "gram"


@pytest.mark.parametrize("seed", range(6))
def test_small_matrices_of_every_kind_through_the_search(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "SMALL", 0)
    rng = np.random.default_rng(seed)
    for case in range(50):
        m, n = (int(size) for size in rng.integers(1, 90, size=2))
        values: Float64 = 0.5 ** rng.integers(0, 12, size=min(m, n)).astype(np.float64)
        values[rng.integers(0, min(m, n) + 1) :] = 0.0
        values[0] = 1.0
        scale = float(rng.choice([1e-30, 1.0, 1e30]))
        known = Planted.of(with_spectrum(m, n, values, noise=float(rng.choice([0.0, 0.01, 0.5]))) * scale)
        share = float(rng.uniform(0.3, 0.999))
        found = decompose(known.delta, name=f"case {case}", rule=Rule(threshold=share))
        # Within 1e-6 of a tie, float32 cannot tell which side of the threshold a rank is on.
        fewest, most = known.fewest(share - 1e-6), known.fewest(share + 1e-6)
        assert fewest <= found.rank <= max(most * 1.02, most), (case, m, n, share)
        assert found.captured_energy == pytest.approx(true_energy(known.delta, found), rel=1e-5)


@pytest.mark.parametrize("delta", [torch.ones(3), torch.ones(3, 3, dtype=torch.float64)])
def test_only_float32_matrices_are_accepted(delta: Tensor) -> None:
    with pytest.raises(TypeError, match="float32 matrix"):
        decompose(delta, name="w")


def test_a_sketch_of_another_shape_is_refused() -> None:
    with pytest.raises(TypeError, match="sketch"):
        decompose(torch.ones(3, 2), name="w", sketch=torch.ones(2, 3))


# What is stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_stated_residual_is_that_of_the_stored_pair(spectrum: str, dtype: torch.dtype) -> None:
    delta = planted(spectrum).delta
    for cap in (4, 64):
        found = decompose(delta, name="w", rule=Rule(threshold=0.995), rank_max=cap)
        stored = balanced(found, dtype)
        assert (stored.down.dtype, stored.up.dtype, stored.down.shape[0], stored.up.shape[1]) == (
            dtype,
            dtype,
            found.rank,
            found.rank,
        )
        true = relative_distance(delta, stored.up.double() @ stored.down.double())
        assert stored_residual(found, stored) == pytest.approx(true, rel=0, abs=1e-5)


def test_residual_of_any_other_pair_counts_too() -> None:
    # A pair far from the decomposition, such as one scaled by a wrong alpha.
    delta = planted("noise floor 3 %").delta
    found = decompose(delta, name="w", rank=12)
    stored = balanced(found, torch.float32)
    true = relative_distance(delta, stored.up.double() @ (0.25 * stored.down.double()))
    assert stored_residual(found, LowRank(stored.up, 0.25 * stored.down)) == pytest.approx(true, rel=1e-5)


def test_rank_zero_pair_of_a_delta_loses_everything() -> None:
    found = decompose(planted("fast").delta, name="w", rank=3)
    nothing = Decomposition(
        "w", found.left[:, :0], found.singular_values[:0], found.right[:0], 4.0, 0.0, 4.0, False, None, "krylov", 1
    )
    assert stored_residual(nothing, LowRank(found.left[:, :0], found.right[:0])) == 1.0


@pytest.mark.parametrize("spectrum", ["fast", "noise floor 30 %", "repeated"])
def test_refitting_beats_rounding_both_factors(spectrum: str) -> None:
    found = decompose(planted(spectrum).delta, name="w", rank=24)
    stored = balanced(found, torch.bfloat16)
    root = found.singular_values.sqrt()
    rounded = (found.left * root).bfloat16().double() @ (root[:, None] * found.right).bfloat16().double()
    refitted = stored.up.double() @ stored.down.double()
    assert relative_distance(dense(found), refitted) < 0.99 * relative_distance(dense(found), rounded)


def test_factors_share_the_singular_values_evenly() -> None:
    found = decompose(planted("fast").delta, name="w", rank=8)
    stored = balanced(found, torch.float32)
    root = found.singular_values.sqrt().float()
    torch.testing.assert_close(stored.down.norm(dim=1), root)
    torch.testing.assert_close(stored.up.norm(dim=0), root)


def test_factors_that_overflow_the_dtype_are_refused_by_name() -> None:
    found = decompose(planted("fast").delta * 1e14, name="layers.3.w1", rank=2)
    with pytest.raises(NonFiniteError, match=r'"layers\.3\.w1" is too large for float16'):
        balanced(found, torch.float16)
    stored = balanced(found, torch.bfloat16)
    assert bool(torch.isfinite(stored.down).all() and torch.isfinite(stored.up).all())


def test_factors_that_underflow_the_dtype_become_zeros() -> None:
    stored = balanced(decompose(planted("fast").delta * 1e-30, name="w", rank=2), torch.float16)
    assert (int(stored.down.count_nonzero()), int(stored.up.count_nonzero())) == (0, 0)


# The parts
