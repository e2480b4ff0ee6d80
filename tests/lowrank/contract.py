"""The contract of a truncated decomposition: what every implementation says and returns, against numpy's float64 SVD.

Inherit from ``DecompositionContract`` and give ``decompose`` to hold an implementation to it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergetool.errors import NonFiniteError, UsageError
from mergetool.lowrank.balanced import balanced, stored_residual
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.rules import Rule

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


INDEX = np.arange(400.0)  # more than a planted delta has directions: they are cut

SPECTRA: dict[str, tuple[Float64, float]] = {
    "fast": (0.8**INDEX, 0.0),
    "power law": ((INDEX + 1) ** -0.8, 0.0),
    "steep power law": ((INDEX + 1) ** -1.5, 0.0),
    "flat": (np.ones(400), 0.0),
    "low rank": (np.array([1.0, 0.9, 0.5, 0.2, 0.1]), 0.0),
    "repeated": (np.repeat([1.0, 0.45, 0.1], [45, 40, 60]), 0.0),
    "noise floor 0.1 %": (0.85 ** np.arange(24.0), 0.001),
    "noise floor 3 %": (0.85 ** np.arange(24.0), 0.03),
    "noise floor 30 %": (0.85 ** np.arange(8.0), 0.3),
}


@functools.cache
def planted(spectrum: str, m: int = 320, n: int = 199) -> Planted:
    values, noise = SPECTRA[spectrum]
    return Planted.of(with_spectrum(m, n, values[: min(m, n)], noise))


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


def same_bytes(a: Decomposition, b: Decomposition) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("left", "singular_values", "right"))


class DecompositionContract(ABC):
    """``shape`` is that of the planted deltas: large enough that the implementation searches, and has to be right."""

    shape = (320, 199)
    search = "krylov"

    @abstractmethod
    def decompose(self, delta: Tensor, *, name: str, sketch: Tensor | None = None, **options: Any) -> Decomposition:
        """One delta's decomposition, with its cheap products from ``sketch``; vectors on the CPU."""

    def planted(self, spectrum: str) -> Planted:
        return planted(spectrum, *self.shape)

    @pytest.mark.parametrize("products", ["bf16", "fp32"])
    @pytest.mark.parametrize("lies", ["tall", "wide"])
    @pytest.mark.parametrize("spectrum", SPECTRA)
    def test_rank_is_the_fewest_that_reach_the_threshold(self, spectrum: str, lies: str, products: str) -> None:
        known = self.planted(spectrum)
        delta = known.delta if lies == "tall" else known.delta.T.contiguous()
        for share in THRESHOLDS:
            found = self.decompose(
                delta, name="w", rule=Rule(threshold=share), sketch=delta.bfloat16() if products == "bf16" else delta
            )
            exact = known.fewest(share)
            assert exact <= found.rank <= exact * 1.02, (share, found.method)
            assert found.captured_energy >= share * found.total_energy
            assert not found.capped

    @pytest.mark.parametrize("spectrum", SPECTRA)
    def test_stated_energies_are_those_of_the_returned_factors(self, spectrum: str) -> None:
        known = self.planted(spectrum)
        for share in THRESHOLDS:
            found = self.decompose(known.delta, name="w", rule=Rule(threshold=share))
            lost = float((known.delta.double() - dense(found)).square().sum())
            assert found.total_energy == pytest.approx(known.total, rel=1e-8)
            assert found.captured_energy == pytest.approx(true_energy(known.delta, found), rel=1e-7)
            assert found.captured_energy == pytest.approx(float(found.singular_values.square().sum()), rel=1e-12)
            assert found.lost_energy == pytest.approx(lost, rel=1e-4, abs=1e-8 * known.total)

    @pytest.mark.parametrize("spectrum", SPECTRA)
    def test_factors_are_orthonormal_and_values_fall(self, spectrum: str) -> None:
        found = self.decompose(self.planted(spectrum).delta, name="w", rule=Rule(threshold=0.99))
        identity = torch.eye(found.rank, dtype=torch.float64)
        left, right = found.left.double(), found.right.double()
        assert found.left.dtype == found.right.dtype == torch.float32
        torch.testing.assert_close(left.T @ left, identity, rtol=0, atol=2e-6)
        torch.testing.assert_close(right @ right.T, identity, rtol=0, atol=2e-6)
        assert bool((found.singular_values.diff() <= 0).all())

    def test_singular_values_are_those_of_numpy(self) -> None:
        known = self.planted("fast")
        found = self.decompose(known.delta, name="w", rule=Rule(threshold=0.995))
        np.testing.assert_allclose(found.singular_values.numpy(), np.sqrt(known.energies[: found.rank]), atol=1e-5)

    def test_low_rank_delta_is_recovered_to_float32_precision(self) -> None:
        # The error of BF16 products, 1e-3 of the delta, would show in the residual of a delta that has no tail.
        delta = with_spectrum(500, 300, 0.8 ** np.arange(20.0))
        for options in ({"rank": 20}, {"rule": Rule(threshold=1.0), "rank_max": 64}):
            found = self.decompose(delta, name="w", sketch=delta.bfloat16(), **options)
            assert found.rank == 20
            assert relative_distance(delta, dense(found)) < 1e-6

    def test_threshold_one_keeps_every_direction_of_a_low_rank_delta(self) -> None:
        known = self.planted("low rank")
        found = self.decompose(known.delta, name="w", rule=Rule(threshold=1.0))
        assert (found.rank, found.method) == (5, self.search)
        assert math.sqrt(found.lost_energy / found.total_energy) < 1e-6

    @pytest.mark.parametrize("dense_delta", [True, False])
    def test_copies_of_a_value_that_a_block_cannot_hold_are_found(self, dense_delta: bool) -> None:
        # Blocks are 32 wide, so a plain Krylov space holds 32 of the 80 equal values: it takes 45 directions for 34.
        values = np.concatenate([np.ones(80), 0.4 * 0.98 ** np.arange(200)])
        delta = with_spectrum(1000, 1000, values)
        if not dense_delta:
            delta = torch.diag(torch.from_numpy(np.pad(values, (0, 720)))).float()
        exact = int(np.searchsorted(np.cumsum(values**2), 0.4 * float((values**2).sum()))) + 1
        assert self.decompose(delta, name="w", rule=Rule(threshold=0.4), sketch=delta).rank == exact

    @pytest.mark.parametrize("rank", [5, 12, 20])
    def test_threshold_reached_by_a_hair_takes_no_direction_more(self, rank: int) -> None:
        # BF16 directions miss some 3e-6 of the energy: what they cannot decide, float32 must.
        known = self.planted("noise floor 0.1 %")
        share = (known.best(rank) / known.total) - 5e-7
        found = self.decompose(known.delta, name="w", rule=Rule(threshold=share), sketch=known.delta.bfloat16())
        assert (found.rank, found.method) == (rank, self.search)

    def test_threshold_inside_the_noise_is_met_with_two_percent_at_most(self) -> None:
        known = noisy_layer()
        share = known.best(90) / known.total - 1e-5
        assert 90 <= self.decompose(known.delta, name="w", rule=Rule(threshold=share)).rank <= 91

    def test_useless_cheap_products_cost_time_but_no_truth(self) -> None:
        # The certificate must rest on the float32 delta alone: a sketch of something else misleads the search only.
        known = self.planted("noise floor 0.1 %")
        wrong = torch.randn(*self.shape, generator=torch.Generator().manual_seed(3)).bfloat16()
        fixed = self.decompose(known.delta, name="w", rank=8, sketch=wrong)
        assert fixed.captured_energy == pytest.approx(true_energy(known.delta, fixed), rel=1e-6)
        assert fixed.total_energy == pytest.approx(known.total, rel=1e-8)
        found = self.decompose(known.delta, name="w", rule=Rule(threshold=0.95), sketch=wrong)
        assert true_energy(known.delta, found) >= 0.95 * known.total

    @pytest.mark.parametrize("cap", [16, 64])
    def test_capped_factors_hold_nearly_the_most_energy_that_rank_can(self, cap: int) -> None:
        known = noisy_layer()
        found = self.decompose(known.delta, name="w", rule=Rule(threshold=0.995), rank_max=cap)
        assert (found.capped, found.rank, found.method) == (True, cap, self.search)
        assert known.best(cap) - found.captured_energy < 1e-3 * known.total

    @pytest.mark.parametrize("spectrum", ["power law", "flat", "noise floor 3 %", "noise floor 30 %"])
    def test_capped_layer_says_which_rank_the_threshold_wants(self, spectrum: str) -> None:
        known = self.planted(spectrum)
        found = self.decompose(known.delta, name="w", rule=Rule(threshold=0.99), rank_max=32)
        assert found.capped
        assert found.rank_wanted == pytest.approx(known.fewest(0.99), rel=0.1)

    def test_threshold_reached_at_the_cap_is_not_capped(self) -> None:
        known = self.planted("fast")
        exact = known.fewest(0.99)
        reached = self.decompose(known.delta, name="w", rule=Rule(threshold=0.99), rank_max=exact)
        missed = self.decompose(known.delta, name="w", rule=Rule(threshold=0.99), rank_max=exact - 1)
        assert (reached.rank, reached.capped, reached.rank_wanted) == (exact, False, None)
        assert (missed.rank, missed.capped) == (exact - 1, True)
        assert missed.rank_wanted is not None
        assert missed.rank_wanted >= exact

    @pytest.mark.parametrize("rank", [1, 40, 150])
    def test_fixed_rank_is_kept_whatever_threshold_and_cap_say(self, rank: int) -> None:
        known = self.planted("noise floor 3 %")
        found = self.decompose(known.delta, name="w", rank=rank, rule=Rule(threshold=0.5), rank_max=4)
        assert (found.rank, found.capped, found.rank_wanted) == (rank, False, None)
        assert known.best(rank) - found.captured_energy < 1e-3 * known.total

    def test_threshold_that_the_cap_just_reaches_is_not_given_up(self) -> None:
        # Deep in flat noise, where the search gains slowly, energy within the cap's usual tolerance has to be found.
        known = noisy_layer()
        share = known.best(80) / known.total - 1e-4
        found = self.decompose(known.delta, name="w", rule=Rule(threshold=share), rank_max=80)
        assert (found.capped, found.rank <= 80) == (False, True)

    def test_fixed_rank_stops_at_the_rank_the_delta_has(self) -> None:
        found = self.decompose(self.planted("low rank").delta, name="w", rank=30)
        assert (found.rank, found.capped) == (5, False)

    def test_cap_above_the_short_side_is_no_cap(self) -> None:
        found = self.decompose(self.planted("flat").delta, name="w", rule=Rule(threshold=1.0), rank_max=4096)
        assert (found.rank, found.capped) == (min(self.shape), False)

    @pytest.mark.parametrize("shape", [(1, 700), (700, 1), (1, 1), (2, 300)])
    def test_thin_matrices(self, shape: tuple[int, int]) -> None:
        delta = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        found = self.decompose(delta, name="w", rule=Rule(threshold=1.0))
        assert found.rank == min(shape)
        torch.testing.assert_close(dense(found).float(), delta)

    def test_zero_delta_has_rank_zero(self) -> None:
        found = self.decompose(torch.zeros(40, 30), name="w", rule=Rule(threshold=0.9))
        assert (found.rank, found.total_energy, found.method, found.capped) == (0, 0.0, "zero", False)
        stored = balanced(found, torch.bfloat16)
        assert (stored.down.shape, stored.up.shape, stored_residual(found, stored)) == ((0, 30), (40, 0), 0.0)

    @pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1e12, 1e30])
    def test_scale_of_the_delta_does_not_matter(self, scale: float) -> None:
        # At 1e-37 most values are subnormal: 15 bits of them are left.
        known = self.planted("noise floor 0.1 %")
        found = self.decompose(known.delta * scale, name="w", rule=Rule(threshold=0.99))
        assert found.rank == known.fewest(0.99)
        assert math.sqrt(found.total_energy) / scale == pytest.approx(math.sqrt(known.total), rel=1e-3)
        np.testing.assert_allclose(found.singular_values / scale, np.sqrt(known.energies[: found.rank]), rtol=1e-3)

    def test_a_view_is_decomposed_like_its_copy(self) -> None:
        delta = self.planted("fast").delta
        view = self.decompose(delta.T, name="w", rule=Rule(threshold=0.99))
        copy = self.decompose(delta.T.contiguous(), name="w", rule=Rule(threshold=0.99))
        assert torch.equal(view.left, copy.left)
        assert view.left.is_contiguous()
        assert view.right.is_contiguous()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_values_that_are_not_finite_are_refused_by_name_and_place(self, bad: float) -> None:
        delta = self.planted("fast").delta.clone()
        delta[17, 5] = bad
        with pytest.raises(NonFiniteError, match=r'"layers\.3\.w1" holds 1 values .* row 17, column 5'):
            self.decompose(delta, name="layers.3.w1")

    def test_values_whose_squares_overflow_float32_are_not_refused(self) -> None:
        assert self.decompose(torch.full((5, 4), 3e38), name="w").total_energy == pytest.approx(20 * 9e76, rel=1e-6)

    @pytest.mark.parametrize("options", [{"rank": -1}, {"rank_max": -1}])
    def test_options_without_meaning_are_refused(self, options: dict[str, float]) -> None:
        with pytest.raises(UsageError):
            self.decompose(torch.ones(3, 3), name="w", **options)  # type: ignore[arg-type]

    def test_result_does_not_depend_on_earlier_calls_or_the_global_generator(self) -> None:
        delta = noisy_layer().delta[:600, :400].contiguous()
        first = self.decompose(delta, name="a", rank=16)
        torch.manual_seed(99)
        state = torch.get_rng_state()
        self.decompose(delta, name="b", rank=16)
        again = self.decompose(delta, name="a", rank=16)
        assert same_bytes(first, again)
        assert torch.equal(state, torch.get_rng_state())

    def test_seed_and_name_choose_the_random_numbers(self) -> None:
        delta = noisy_layer().delta[:600, :400].contiguous()
        plain = self.decompose(delta, name="a", rank=16)
        assert not same_bytes(plain, self.decompose(delta, name="b", rank=16))
        assert not same_bytes(plain, self.decompose(delta, name="a", rank=16, seed=1))

    def test_largest_entry_of_each_left_vector_is_positive(self) -> None:
        for delta in (self.planted("fast").delta, self.planted("fast").delta.T.contiguous()):
            found = self.decompose(delta, name="w", rule=Rule(threshold=0.99))
            largest = found.left.abs().argmax(dim=0)
            assert bool((found.left.gather(0, largest[None]) > 0).all())
            torch.testing.assert_close(
                dense(found), dense(self.decompose(-delta, name="w", rule=Rule(threshold=0.99))) * -1
            )

    def test_first_of_equal_entries_decides_the_sign(self) -> None:
        delta = torch.tensor([[-1.0, -2.0], [1.0, 2.0]])
        left = self.decompose(delta, name="w").left[:, 0]
        torch.testing.assert_close(left, torch.tensor([1.0, -1.0]) / math.sqrt(2))
