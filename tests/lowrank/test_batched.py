"""The decomposition of many deltas at once: the same contract, and what only a batch can get wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergetool.errors import NonFiniteError
from mergetool.lowrank import batched
from mergetool.lowrank.balanced import balanced, balanced_batch, stored_residual
from mergetool.lowrank.batched import decompose_batch
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.norms import energies_of, squared_norm
from mergetool.lowrank.rules import Rule
from tests.lowrank.contract import (
    SPECTRA,
    DecompositionContract,
    Float64,
    Planted,
    dense,
    noisy_layer,
    planted,
    relative_distance,
    true_energy,
    with_spectrum,
)

SHAPE = (640, 320)


def many(shape: tuple[int, int] = SHAPE) -> tuple[list[Planted], Tensor, list[str]]:
    known = [planted(spectrum, *shape) for spectrum in SPECTRA]
    return known, torch.stack([one.delta for one in known]), list(SPECTRA)


class TestDecomposeBatch(DecompositionContract):
    shape = SHAPE
    search = "subspace"

    def decompose(self, delta: Tensor, *, name: str, sketch: Tensor | None = None, **options: Any) -> Decomposition:
        cheap = None if sketch is None else sketch[None]
        return decompose_batch(delta[None], [name], sketch=cheap, **options)[0]  # type: ignore[arg-type]


@pytest.mark.gpu
class TestDecomposeBatchOnGpu(DecompositionContract):
    shape = SHAPE
    search = "subspace"

    def decompose(self, delta: Tensor, *, name: str, sketch: Tensor | None = None, **options: Any) -> Decomposition:
        from dataclasses import replace

        cheap = None if sketch is None else sketch[None].cuda()
        found = decompose_batch(delta[None].cuda(), [name], sketch=cheap, **options)[0]  # type: ignore[arg-type]
        return replace(found, left=found.left.cpu(), right=found.right.cpu())


# A batch is its matrices


@pytest.mark.parametrize(
    "options", [{"rule": Rule(threshold=0.99)}, {"rule": Rule(threshold=0.99), "rank_max": 24}, {"rank": 12}]
)
def test_every_matrix_of_a_batch_is_decomposed_as_if_alone(options: dict[str, float]) -> None:
    # Matrices that are settled at once, ones that go on, ones that need a wider block and ones that need all.
    _, deltas, names = many()
    together = decompose_batch(deltas, names, **options)  # type: ignore[arg-type]
    for i, found in enumerate(together):
        alone = decompose_batch(deltas[i : i + 1], names[i : i + 1], **options)[0]  # type: ignore[arg-type]
        assert (found.name, found.rank, found.capped, found.method) == (
            names[i],
            alone.rank,
            alone.capped,
            alone.method,
        )
        assert relative_distance(dense(alone), dense(found)) < 1e-3
        np.testing.assert_allclose(found.captured_energy, alone.captured_energy, rtol=1e-6)


def test_ranks_of_a_batch_are_each_the_fewest() -> None:
    known, deltas, names = many()
    for found, one in zip(decompose_batch(deltas, names, rule=Rule(threshold=0.95)), known, strict=True):
        assert one.fewest(0.95) <= found.rank <= one.fewest(0.95) * 1.01, found.name


def test_zero_and_scaled_matrices_do_not_disturb_their_neighbours() -> None:
    delta = planted("noise floor 3 %", *SHAPE).delta
    scales = [1.0, 0.0, 1e-30, 1e30]
    found = decompose_batch(torch.stack([delta * scale for scale in scales]), list("abcd"), rank=8)
    assert [one.rank for one in found] == [8, 0, 8, 8]
    for scale, one in zip(scales, found, strict=True):
        values = found[0].singular_values * scale
        np.testing.assert_allclose(one.singular_values, values[: one.rank], rtol=1e-4)


def test_a_matrix_that_is_not_finite_is_named() -> None:
    deltas = torch.stack([planted("fast", *SHAPE).delta] * 3)
    deltas[1, 3, 4] = math.nan
    with pytest.raises(NonFiniteError, match='"second" holds 1 values'):
        decompose_batch(deltas, ["first", "second", "third"], rank=2)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_wider_than_the_matrix_are_no_special_case(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "SMALL", 0)
    monkeypatch.setattr(batched, "LARGEST_BASIS", 1e9)
    rng = np.random.default_rng(seed)
    for case in range(10):
        m, n = (int(size) for size in rng.integers(1, 90, size=2))
        known = []
        for _ in range(5):
            values: Float64 = 0.5 ** rng.integers(0, 12, size=min(m, n)).astype(np.float64)
            values[rng.integers(0, min(m, n) + 1) :] = 0.0
            values[0] = 1.0
            known.append(Planted.of(with_spectrum(m, n, values, noise=float(rng.choice([0.0, 0.01, 0.5])))))
        share = float(rng.uniform(0.3, 0.999))
        names = [f"case {case}, {i}" for i in range(5)]
        for one, found in zip(
            known,
            decompose_batch(torch.stack([k.delta for k in known]), names, rule=Rule(threshold=share)),
            strict=False,
        ):
            fewest, most = one.fewest(share - 1e-6), one.fewest(share + 1e-6)
            assert fewest <= found.rank <= max(most * 1.02, most), (found.name, m, n, share)
            assert found.method == "subspace"
            assert found.captured_energy == pytest.approx(true_energy(one.delta, found), rel=1e-5)


def test_a_block_that_is_too_narrow_grows_until_the_threshold_is_met() -> None:
    known = noisy_layer()
    share = known.best(150) / known.total - 1e-6
    found = decompose_batch(known.delta[None], ["w"], rule=Rule(threshold=share))[0]
    assert (150 <= found.rank <= 151, found.method) == (True, "subspace")


def test_directions_that_are_not_orthonormal_are_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    certify = batched._certify

    def skewed(matrices: Tensor, columns: Tensor) -> batched._Certificate:
        found = certify(matrices, columns)
        return batched._Certificate(found.left, found.right, found.energies, found.gains, [1.0] * len(found.left))

    monkeypatch.setattr(batched, "_certify", skewed)
    known = planted("noise floor 3 %", *SHAPE)
    found = decompose_batch(known.delta[None], ["w"], rule=Rule(threshold=0.95))[0]
    assert (found.method, found.rank) == ("gram", known.fewest(0.95))


def test_precision_of_the_process_is_left_as_it_was() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with batched.ieee_float32(), batched.ieee_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# The parts


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 40, 64), (2, 300, 130)])
def test_squared_norms_are_those_of_each_matrix(shape: tuple[int, int, int]) -> None:
    deltas = (
        torch.randn(shape, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-25, 1.0, 1e25])[: shape[0], None, None]
    )
    truth = deltas.double().square().sum((1, 2)).tolist()
    np.testing.assert_allclose(energies_of(deltas), truth, rtol=1e-7)
    assert squared_norm(deltas[1]) == pytest.approx(truth[1], rel=1e-7)


def test_whitening_makes_columns_orthonormal_and_keeps_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(3, 50, 8, dtype=torch.float64, generator=generator) * 10.0 ** torch.arange(-4.0, 4.0)
    columns[1, :, 3] = 0.0
    white = columns @ batched._whitening(columns.mT @ columns)
    expected = torch.eye(8, dtype=torch.float64).repeat(3, 1, 1)
    expected[1, 3, 3] = 0.0
    torch.testing.assert_close(white.mT @ white, expected, rtol=0, atol=1e-10)


def test_smallest_energy_is_approached_from_below() -> None:
    values = torch.stack([torch.ones(96), 0.9 ** torch.arange(96.0), 10.0 ** -torch.linspace(0, 9, 96)]).double()
    turn = torch.linalg.qr(torch.randn(96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    found = batched._smallest_energy(turn @ values.diag_embed() @ turn.T)
    ratio = found / values.amin(1)
    assert bool(((ratio > 0.75) & (ratio < 1 + 1e-4)).all())


def test_filtered_steps_find_more_than_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    known = noisy_layer()
    start = torch.randn(1, 1000, 96, generator=torch.Generator().manual_seed(0))

    def missed(columns: Tensor) -> float:
        return known.best(64) - float(batched._certify(known.delta[None], columns).energies[0, :64].sum())

    filtered = missed(batched._iterate(known.delta[None], start, 8, warm=False))
    monkeypatch.setattr(batched, "_smallest_energy", lambda gram: gram.new_zeros(len(gram)))
    assert filtered < 0.2 * missed(batched._iterate(known.delta[None], start, 8, warm=False))


@pytest.mark.parametrize("apart", [0.0, 1e-15, 1e-13, 1e-11, 1e-9, 1e-7])
def test_certificate_of_columns_that_are_nearly_one_is_orthonormal(apart: float) -> None:
    delta = planted("power law", *SHAPE).delta[None]
    columns = torch.randn(1, 320, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns[..., 6:] = columns[..., :6] + apart * columns[..., 6:]
    found = batched._certify(delta, columns)
    there = found.energies[0] > 0
    right, identity = found.right[0, :, there].double(), torch.eye(int(there.sum()), dtype=torch.float64)
    assert int(there.sum()) >= 6
    torch.testing.assert_close(right.T @ right, identity, rtol=0, atol=1e-6)
    span = torch.linalg.qr(found.right[0, :, there].double())[0]
    assert float(found.energies.sum()) == pytest.approx(float((delta[0].double() @ span).square().sum()), rel=1e-6)


def test_doubt_covers_what_is_missing() -> None:
    known = noisy_layer()
    columns = torch.randn(1, 1000, 96, generator=torch.Generator().manual_seed(0))
    for steps in (3, 5, 8, 11):
        found = batched._certify(known.delta[None], batched._iterate(known.delta[None], columns, steps, warm=False))
        for rank in (8, 32, 64):
            missing = known.best(rank) - float(found.energies[0, :rank].sum())
            assert missing <= batched.DOUBT * float(found.gains[0, :rank].sum()) + 1e-8 * known.total, (steps, rank)


# What is stored


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_of_a_batch_have_the_stated_residuals(dtype: torch.dtype) -> None:
    known, deltas, names = many()
    found = decompose_batch(deltas, names, rule=Rule(threshold=0.995), rank_max=64)
    assert len({one.rank for one in found}) > 3
    for one, pair, (stored, residual) in zip(known, found, balanced_batch(found, dtype), strict=True):
        assert (stored.down.dtype, stored.up.dtype) == (dtype, dtype)
        assert (stored.down.shape, stored.up.shape) == ((pair.rank, SHAPE[1]), (SHAPE[0], pair.rank))
        true = relative_distance(one.delta, stored.up.double() @ stored.down.double())
        assert residual == pytest.approx(true, rel=0, abs=1e-5), pair.name


def test_factors_of_a_batch_are_those_of_each_alone() -> None:
    _, deltas, names = many()
    found = decompose_batch(deltas, names, rule=Rule(threshold=0.99), rank_max=32)
    for one, (stored, residual) in zip(found, balanced_batch(found, torch.bfloat16), strict=True):
        alone = balanced(one, torch.bfloat16)
        assert torch.equal(stored.down, alone.down)
        # Half a unit of the last place here and there: the least squares are solved another way.
        assert float((stored.up != alone.up).double().mean()) < 1e-3
        assert residual == pytest.approx(stored_residual(one, alone), rel=1e-4)


def test_rows_that_underflow_and_zero_deltas_get_factors_too(monkeypatch: pytest.MonkeyPatch) -> None:
    delta = planted("fast", *SHAPE).delta
    found = decompose_batch(torch.stack([delta, delta * 1e-30, delta * 0]), list("abc"), rank=2)
    stored, residuals = zip(*balanced_batch(found, torch.float16), strict=True)
    assert [tuple(one.down.shape) for one in stored] == [(2, 320), (2, 320), (0, 320)]
    assert [int(one.down.count_nonzero()) == 0 for one in stored] == [False, True, True]
    assert residuals[1:] == (pytest.approx(1.0), 0.0)
    assert balanced_batch([found[2]], torch.float16)[0][0].up.shape == (640, 0)


def test_factors_that_overflow_the_dtype_are_refused_by_name() -> None:
    delta = planted("fast", *SHAPE).delta
    found = decompose_batch(torch.stack([delta, delta * 1e14]), ["layers.2.w1", "layers.3.w1"], rank=2)
    with pytest.raises(NonFiniteError, match=r'"layers\.3\.w1" is too large for float16'):
        balanced_batch(found, torch.float16)


def test_a_gram_matrix_that_cannot_be_factored_is_left_to_the_pseudo_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    found = decompose_batch(planted("fast", *SHAPE).delta[None], ["w"], rank=4)
    _, expected = balanced_batch(found, torch.bfloat16)[0]
    factored = torch.linalg.cholesky_ex

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = factored(matrix)
        return factor * torch.nan, info + 1

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    _, again = balanced_batch(found, torch.bfloat16)[0]
    assert again == pytest.approx(expected, rel=1e-4)
