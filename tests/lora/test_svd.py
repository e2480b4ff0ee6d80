"""The truncated decomposition against numpy's float64 SVD of the same matrix."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergetool.errors import NonFiniteError, UsageError
from mergetool.lora import krylov, svd
from mergetool.lora.krylov import BlockKrylov, Products, orthonormal_rows
from mergetool.lora.range_finder import project
from mergetool.lora.svd import Decomposition, balanced_factors, decompose, squared_norm, stored_residual
from mergetool.lora.tail import noise_count, noise_edge, rank_for_energy

Float64 = NDArray[np.float64]
THRESHOLDS = (0.9, 0.95, 0.99, 0.995)


@dataclass(frozen=True, eq=False)
class Planted:
    """A delta, and its squared singular values as numpy sees them in float64."""

    delta: Tensor
    energies: Float64

    @classmethod
    def of(cls, delta: Tensor) -> Planted:
        return cls(delta, np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2)

    @property
    def total(self) -> float:
        return float(self.energies.sum())

    def fewest(self, share: float) -> int:
        return int(np.searchsorted(np.cumsum(self.energies), share * self.total)) + 1

    def best(self, rank: int) -> float:
        return float(self.energies[:rank].sum())


def orthonormal(rows: int, columns: int, rng: np.random.Generator) -> Float64:
    return np.asarray(np.linalg.qr(rng.standard_normal((rows, columns)))[0])


def with_spectrum(m: int, n: int, values: Float64, noise: float = 0.0) -> Tensor:
    """A delta [m, n] with the given singular values, of which Gaussian noise makes up the share ``noise`` of energy."""
    rng = np.random.default_rng(7)
    k = len(values)
    signal = orthonormal(m, k, rng) * values @ orthonormal(n, k, rng).T
    floor = rng.standard_normal((m, n))
    signal *= math.sqrt(1 - noise) / np.linalg.norm(signal)
    return torch.from_numpy(signal + floor * (math.sqrt(noise) / np.linalg.norm(floor))).float()


INDEX = np.arange(199.0)
SPECTRA: dict[str, tuple[Float64, float]] = {
    "fast": (0.8**INDEX, 0.0),
    "power law": ((INDEX + 1) ** -0.8, 0.0),
    "steep power law": ((INDEX + 1) ** -1.5, 0.0),
    "flat": (np.ones(199), 0.0),
    "low rank": (np.array([1.0, 0.9, 0.5, 0.2, 0.1]), 0.0),
    "repeated": (np.repeat([1.0, 0.45, 0.1], [45, 40, 60]), 0.0),
    "noise floor 0.1 %": (0.85 ** np.arange(24.0), 0.001),
    "noise floor 3 %": (0.85 ** np.arange(24.0), 0.03),
    "noise floor 30 %": (0.85 ** np.arange(8.0), 0.3),
}


@functools.cache
def planted(spectrum: str, m: int = 320, n: int = 199) -> Planted:
    return Planted.of(with_spectrum(m, n, *SPECTRA[spectrum]))


@functools.cache
def noisy_layer() -> Planted:
    """The hard case at some size: 32 directions above a flat tail that holds 30 % of the energy."""
    return Planted.of(with_spectrum(1500, 1000, 0.9 ** np.arange(32.0), noise=0.3))


def dense(found: Decomposition) -> Tensor:
    return (found.left.double() * found.singular_values) @ found.right.double()


def true_energy(delta: Tensor, found: Decomposition) -> float:
    """The energy of ``delta`` inside the returned directions, from their float64 projection of it."""
    left, right = torch.linalg.qr(found.left.double())[0], torch.linalg.qr(found.right.double().T)[0]
    return float((left.T @ delta.double() @ right).square().sum())


def relative_distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / a.double().norm())


# The rank of a threshold, and the energy stated for it


@pytest.mark.parametrize("products", ["bf16", "fp32"])
@pytest.mark.parametrize("lies", ["tall", "wide"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rank_is_the_fewest_that_reach_the_threshold(spectrum: str, lies: str, products: str) -> None:
    known = planted(spectrum)
    delta = known.delta if lies == "tall" else known.delta.T.contiguous()
    for share in THRESHOLDS:
        found = decompose(delta, name="w", rank_thresh=share, sketch=delta.bfloat16() if products == "bf16" else delta)
        exact = known.fewest(share)
        assert exact <= found.rank <= exact * 1.02, (share, found.method)
        assert found.captured_energy >= share * found.total_energy
        assert not found.capped


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_stated_energies_are_those_of_the_returned_factors(spectrum: str) -> None:
    known = planted(spectrum)
    for share in THRESHOLDS:
        found = decompose(known.delta, name="w", rank_thresh=share)
        lost = float((known.delta.double() - dense(found)).square().sum())
        assert found.total_energy == pytest.approx(known.total, rel=1e-8)
        assert found.captured_energy == pytest.approx(true_energy(known.delta, found), rel=1e-7)
        assert found.captured_energy == pytest.approx(float(found.singular_values.square().sum()), rel=1e-12)
        assert found.lost_energy == pytest.approx(lost, rel=1e-4, abs=1e-8 * known.total)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_factors_are_orthonormal_and_values_fall(spectrum: str) -> None:
    found = decompose(planted(spectrum).delta, name="w", rank_thresh=0.99)
    identity = torch.eye(found.rank, dtype=torch.float64)
    left, right = found.left.double(), found.right.double()
    assert found.left.dtype == found.right.dtype == torch.float32
    torch.testing.assert_close(left.T @ left, identity, rtol=0, atol=2e-6)
    torch.testing.assert_close(right @ right.T, identity, rtol=0, atol=2e-6)
    assert bool((found.singular_values.diff() <= 0).all())


def test_singular_values_are_those_of_numpy() -> None:
    known = planted("fast")
    found = decompose(known.delta, name="w", rank_thresh=0.995)
    np.testing.assert_allclose(found.singular_values.numpy(), np.sqrt(known.energies[: found.rank]), atol=1e-5)


def test_low_rank_delta_takes_few_passes_and_flat_one_the_whole_spectrum() -> None:
    delta = with_spectrum(1500, 1000, 0.8 ** np.arange(12.0), noise=0.01)
    quick = decompose(delta, name="w", rank_thresh=0.95)
    assert (quick.method, quick.passes <= 12) == ("krylov", True)
    assert decompose(planted("flat").delta, name="w", rank_thresh=0.9).method == "gram"


def test_low_rank_delta_is_recovered_to_float32_precision() -> None:
    # The error of BF16 products, 1e-3 of the delta, would show in the residual of a delta that has no tail.
    delta = with_spectrum(500, 300, 0.8 ** np.arange(20.0))
    for options in ({"rank": 20}, {"rank_thresh": 1.0, "rank_max": 64}):
        found = decompose(delta, name="w", sketch=delta.bfloat16(), **options)
        assert found.rank == 20
        assert relative_distance(delta, dense(found)) < 1e-6


def test_threshold_one_keeps_every_direction_of_a_low_rank_delta() -> None:
    known = planted("low rank")
    found = decompose(known.delta, name="w", rank_thresh=1.0)
    assert (found.rank, found.method) == (5, "krylov")
    assert math.sqrt(found.lost_energy / found.total_energy) < 1e-6


@pytest.mark.parametrize("dense_delta", [True, False])
def test_copies_of_a_value_that_a_block_cannot_hold_are_found(dense_delta: bool) -> None:
    # Blocks are 32 wide, so a plain Krylov space holds 32 of the 80 equal values: it takes 45 directions for 34.
    values = np.concatenate([np.ones(80), 0.4 * 0.98 ** np.arange(200)])
    delta = with_spectrum(1000, 1000, values)
    if not dense_delta:
        delta = torch.diag(torch.from_numpy(np.pad(values, (0, 720)))).float()
    exact = int(np.searchsorted(np.cumsum(values**2), 0.4 * float((values**2).sum()))) + 1
    assert decompose(delta, name="w", rank_thresh=0.4, sketch=delta).rank == exact


@pytest.mark.parametrize("rank", [5, 12, 20])
def test_threshold_reached_by_a_hair_takes_no_direction_more(rank: int) -> None:
    # BF16 directions miss some 3e-6 of the energy: what they cannot decide, float32 must.
    known = planted("noise floor 0.1 %")
    share = (known.best(rank) / known.total) - 5e-7
    found = decompose(known.delta, name="w", rank_thresh=share, sketch=known.delta.bfloat16())
    assert (found.rank, found.method) == (rank, "krylov")


def test_threshold_inside_the_noise_is_met_with_two_percent_at_most() -> None:
    known = noisy_layer()
    share = known.best(90) / known.total - 1e-5
    assert 90 <= decompose(known.delta, name="w", rank_thresh=share).rank <= 91


def test_useless_cheap_products_cost_time_but_no_truth() -> None:
    # The certificate must rest on the float32 delta alone: a sketch of something else misleads the search only.
    known = planted("noise floor 0.1 %")
    wrong = torch.randn(320, 199, generator=torch.Generator().manual_seed(3)).bfloat16()
    fixed = decompose(known.delta, name="w", rank=8, sketch=wrong)
    assert fixed.captured_energy == pytest.approx(true_energy(known.delta, fixed), rel=1e-6)
    assert fixed.total_energy == pytest.approx(known.total, rel=1e-8)
    found = decompose(known.delta, name="w", rank_thresh=0.95, sketch=wrong)
    assert true_energy(known.delta, found) >= 0.95 * known.total


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
        found = decompose(known.delta, name=f"case {case}", rank_thresh=share)
        # Within 1e-6 of a tie, float32 cannot tell which side of the threshold a rank is on.
        fewest, most = known.fewest(share - 1e-6), known.fewest(share + 1e-6)
        assert fewest <= found.rank <= max(most * 1.02, most), (case, m, n, share)
        assert found.captured_energy == pytest.approx(true_energy(known.delta, found), rel=1e-5)


# Caps and fixed ranks


@pytest.mark.parametrize("cap", [16, 64])
def test_capped_factors_hold_nearly_the_most_energy_that_rank_can(cap: int) -> None:
    known = noisy_layer()
    found = decompose(known.delta, name="w", rank_thresh=0.995, rank_max=cap)
    assert (found.capped, found.rank, found.method) == (True, cap, "krylov")
    assert known.best(cap) - found.captured_energy < 1e-3 * known.total


@pytest.mark.parametrize("spectrum", ["power law", "flat", "noise floor 3 %", "noise floor 30 %"])
def test_capped_layer_says_which_rank_the_threshold_wants(spectrum: str) -> None:
    known = planted(spectrum)
    found = decompose(known.delta, name="w", rank_thresh=0.99, rank_max=32)
    assert found.capped
    assert found.rank_wanted == pytest.approx(known.fewest(0.99), rel=0.1)


def test_threshold_reached_at_the_cap_is_not_capped() -> None:
    known = planted("fast")
    exact = known.fewest(0.99)
    reached = decompose(known.delta, name="w", rank_thresh=0.99, rank_max=exact)
    missed = decompose(known.delta, name="w", rank_thresh=0.99, rank_max=exact - 1)
    assert (reached.rank, reached.capped, reached.rank_wanted) == (exact, False, None)
    assert (missed.rank, missed.capped) == (exact - 1, True)
    assert missed.rank_wanted is not None
    assert missed.rank_wanted >= exact


@pytest.mark.parametrize("rank", [1, 40, 150])
def test_fixed_rank_is_kept_whatever_threshold_and_cap_say(rank: int) -> None:
    known = planted("noise floor 3 %")
    found = decompose(known.delta, name="w", rank=rank, rank_thresh=0.5, rank_max=4)
    assert (found.rank, found.capped, found.rank_wanted) == (rank, False, None)
    assert known.best(rank) - found.captured_energy < 1e-3 * known.total


def test_threshold_that_the_cap_just_reaches_is_not_given_up() -> None:
    # Deep in flat noise, where the search gains slowly, energy within the cap's usual tolerance has to be found.
    known = noisy_layer()
    share = known.best(80) / known.total - 1e-4
    found = decompose(known.delta, name="w", rank_thresh=share, rank_max=80)
    assert (found.capped, found.rank <= 80) == (False, True)


def test_fixed_rank_stops_at_the_rank_the_delta_has() -> None:
    found = decompose(planted("low rank").delta, name="w", rank=30)
    assert (found.rank, found.capped) == (5, False)


def test_cap_above_the_short_side_is_no_cap() -> None:
    found = decompose(planted("flat").delta, name="w", rank_thresh=1.0, rank_max=4096)
    assert (found.rank, found.capped) == (199, False)


# Degenerate shapes, scales and values


@pytest.mark.parametrize("shape", [(1, 700), (700, 1), (1, 1), (2, 300)])
def test_thin_matrices(shape: tuple[int, int]) -> None:
    delta = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    found = decompose(delta, name="w", rank_thresh=1.0)
    assert found.rank == min(shape)
    torch.testing.assert_close(dense(found).float(), delta)


def test_zero_delta_has_rank_zero() -> None:
    found = decompose(torch.zeros(40, 30), name="w", rank_thresh=0.9)
    assert (found.rank, found.total_energy, found.method, found.capped) == (0, 0.0, "zero", False)
    down, up = balanced_factors(found, torch.bfloat16)
    assert (down.shape, up.shape, stored_residual(found, down, up)) == ((0, 30), (40, 0), 0.0)


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_the_delta_does_not_matter(scale: float) -> None:
    # At 1e-37 most values are subnormal: 15 bits of them are left.
    known = planted("noise floor 0.1 %")
    found = decompose(known.delta * scale, name="w", rank_thresh=0.99)
    assert found.rank == known.fewest(0.99)
    assert math.sqrt(found.total_energy) / scale == pytest.approx(math.sqrt(known.total), rel=1e-3)
    np.testing.assert_allclose(found.singular_values / scale, np.sqrt(known.energies[: found.rank]), rtol=1e-3)


def test_a_view_is_decomposed_like_its_copy() -> None:
    delta = planted("fast").delta
    view = decompose(delta.T, name="w", rank_thresh=0.99)
    copy = decompose(delta.T.contiguous(), name="w", rank_thresh=0.99)
    assert torch.equal(view.left, copy.left)
    assert view.left.is_contiguous()
    assert view.right.is_contiguous()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name_and_place(bad: float) -> None:
    delta = planted("fast").delta.clone()
    delta[17, 5] = bad
    with pytest.raises(NonFiniteError, match=r'"layers\.3\.w1" holds 1 values .* row 17, column 5'):
        decompose(delta, name="layers.3.w1")


def test_values_whose_squares_overflow_float32_are_not_refused() -> None:
    assert decompose(torch.full((5, 4), 3e38), name="w").total_energy == pytest.approx(20 * 9e76, rel=1e-6)


@pytest.mark.parametrize("options", [{"rank": -1}, {"rank_max": -1}, {"rank_thresh": 0.0}, {"rank_thresh": 1.1}])
def test_options_without_meaning_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        decompose(torch.ones(3, 3), name="w", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [torch.ones(3), torch.ones(3, 3, dtype=torch.float64)])
def test_only_float32_matrices_are_accepted(delta: Tensor) -> None:
    with pytest.raises(TypeError, match="float32 matrix"):
        decompose(delta, name="w")


def test_a_sketch_of_another_shape_is_refused() -> None:
    with pytest.raises(TypeError, match="sketch"):
        decompose(torch.ones(3, 2), name="w", sketch=torch.ones(2, 3))


# The same bytes every time


def same_bytes(a: Decomposition, b: Decomposition) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("left", "singular_values", "right"))


def test_result_does_not_depend_on_earlier_calls_or_the_global_generator() -> None:
    delta = noisy_layer().delta[:600, :400].contiguous()
    first = decompose(delta, name="a", rank=16)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    decompose(delta, name="b", rank=16)
    again = decompose(delta, name="a", rank=16)
    assert same_bytes(first, again)
    assert torch.equal(state, torch.get_rng_state())


def test_seed_and_name_choose_the_random_numbers() -> None:
    delta = noisy_layer().delta[:600, :400].contiguous()
    plain = decompose(delta, name="a", rank=16)
    assert not same_bytes(plain, decompose(delta, name="b", rank=16))
    assert not same_bytes(plain, decompose(delta, name="a", rank=16, seed=1))


def test_largest_entry_of_each_left_vector_is_positive() -> None:
    for delta in (planted("fast").delta, planted("fast").delta.T.contiguous()):
        found = decompose(delta, name="w", rank_thresh=0.99)
        largest = found.left.abs().argmax(dim=0)
        assert bool((found.left.gather(0, largest[None]) > 0).all())
        torch.testing.assert_close(dense(found), dense(decompose(-delta, name="w", rank_thresh=0.99)) * -1)


def test_first_of_equal_entries_decides_the_sign() -> None:
    delta = torch.tensor([[-1.0, -2.0], [1.0, 2.0]])
    left = decompose(delta, name="w").left[:, 0]
    torch.testing.assert_close(left, torch.tensor([1.0, -1.0]) / math.sqrt(2))


# What is stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_stated_residual_is_that_of_the_stored_pair(spectrum: str, dtype: torch.dtype) -> None:
    delta = planted(spectrum).delta
    for cap in (4, 64):
        found = decompose(delta, name="w", rank_thresh=0.995, rank_max=cap)
        down, up = balanced_factors(found, dtype)
        assert (down.dtype, up.dtype, down.shape[0], up.shape[1]) == (dtype, dtype, found.rank, found.rank)
        true = relative_distance(delta, up.double() @ down.double())
        assert stored_residual(found, down, up) == pytest.approx(true, rel=0, abs=1e-5)


def test_residual_of_any_other_pair_counts_too() -> None:
    # A pair far from the decomposition, such as one scaled by a wrong alpha.
    delta = planted("noise floor 3 %").delta
    found = decompose(delta, name="w", rank=12)
    down, up = balanced_factors(found, torch.float32)
    true = relative_distance(delta, up.double() @ (0.25 * down.double()))
    assert stored_residual(found, 0.25 * down, up) == pytest.approx(true, rel=1e-5)


def test_rank_zero_pair_of_a_delta_loses_everything() -> None:
    found = decompose(planted("fast").delta, name="w", rank=3)
    nothing = Decomposition(
        "w", found.left[:, :0], found.singular_values[:0], found.right[:0], 4.0, 0.0, 4.0, False, None, "krylov", 1
    )
    assert stored_residual(nothing, found.right[:0], found.left[:, :0]) == 1.0


@pytest.mark.parametrize("spectrum", ["fast", "noise floor 30 %", "repeated"])
def test_refitting_beats_rounding_both_factors(spectrum: str) -> None:
    found = decompose(planted(spectrum).delta, name="w", rank=24)
    down, up = balanced_factors(found, torch.bfloat16)
    root = found.singular_values.sqrt()
    rounded = (found.left * root).bfloat16().double() @ (root[:, None] * found.right).bfloat16().double()
    refitted = up.double() @ down.double()
    assert relative_distance(dense(found), refitted) < 0.99 * relative_distance(dense(found), rounded)


def test_factors_share_the_singular_values_evenly() -> None:
    found = decompose(planted("fast").delta, name="w", rank=8)
    down, up = balanced_factors(found, torch.float32)
    root = found.singular_values.sqrt().float()
    torch.testing.assert_close(down.norm(dim=1), root)
    torch.testing.assert_close(up.norm(dim=0), root)


def test_factors_that_overflow_the_dtype_are_refused_by_name() -> None:
    found = decompose(planted("fast").delta * 1e14, name="layers.3.w1", rank=2)
    with pytest.raises(NonFiniteError, match=r'"layers\.3\.w1" is too large for float16'):
        balanced_factors(found, torch.float16)
    down, up = balanced_factors(found, torch.bfloat16)
    assert bool(torch.isfinite(down).all() and torch.isfinite(up).all())


def test_factors_that_underflow_the_dtype_become_zeros() -> None:
    down, up = balanced_factors(decompose(planted("fast").delta * 1e-30, name="w", rank=2), torch.float16)
    assert (int(down.count_nonzero()), int(up.count_nonzero())) == (0, 0)


# The parts


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


@pytest.mark.parametrize("shape", [(900, 300), (400, 400)])
def test_noise_law_counts_the_singular_values_of_noise(shape: tuple[int, int]) -> None:
    noise = np.linalg.svd(np.random.default_rng(5).standard_normal(shape), compute_uv=False) ** 2
    long, short = shape
    assert noise[0] / noise.mean() == pytest.approx(noise_edge(short, long), rel=0.03)
    for share in (0.05, 0.3, 0.8, 0.99):
        exact = int(np.searchsorted(np.cumsum(noise), share * noise.sum())) + 1
        assert noise_count(share, short, long) == pytest.approx(exact, rel=0.02, abs=1.5)


@pytest.mark.parametrize("exponent", [0.7, 1.0, 2.0])
def test_rank_of_a_power_law_is_read_off_its_head(exponent: float) -> None:
    energies = np.arange(1.0, 501.0) ** -exponent
    target = 0.97 * float(energies.sum())
    exact = int(np.searchsorted(np.cumsum(energies), target)) + 1
    known = min(16, exact - 1)
    bound, estimate = rank_for_energy(energies[:known], float(energies.sum()), target, (800, 500))
    assert bound <= exact
    assert estimate == pytest.approx(exact, rel=0.1)


def test_rank_estimate_never_leaves_the_matrix() -> None:
    assert rank_for_energy(np.array([1e-3]), 1.0, 0.999, (30, 20)) == (20, 20)
    assert rank_for_energy(np.ones(20), 20.0, 19.99, (30, 20)) == (20, 20)
