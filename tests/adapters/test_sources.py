"""What becomes of every kind of change, against the float64 matrices that the files were written from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.lora_file import LoraFile, open_lora
from mergetool.adapters.sources import source_of
from mergetool.errors import DataError, NonFiniteError
from mergetool.lowrank.low_rank import LowRank
from mergetool.lowrank.matrices import Dense, Kronecker, Matrix, total
from tests.adapters.spellings import SPELLINGS, Written, f64, random


def opened(written: Written, folder: Path) -> LoraFile:
    return open_lora(written.save(folder))


def matrices(file: LoraFile) -> dict[str, Matrix]:
    return {part: source_of(file, change) for part, (change,) in file.changes.items() if len(change.adapter.shape) > 1}


def product(source: Matrix, rank: int) -> np.ndarray:
    found = source.truncated(rank, name="w")
    return (found.left.double() * found.singular_values @ found.right.double()).numpy()


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_decomposed_as_its_dense_matrix(name: str, tmp_path: Path) -> None:
    written = SPELLINGS[name]()
    with opened(written, tmp_path) as file:
        for part, source in matrices(file).items():
            exact = written.changes[part]
            left, values, right = np.linalg.svd(exact, full_matrices=False)
            # A whole difference is worked on in float32 as `mergetool diff` does; all others in float64.
            accuracy = 1e-4 if isinstance(source, Dense) else 1e-6
            count = len(source.spectrum())
            np.testing.assert_allclose(source.spectrum().numpy(), values[:count], atol=accuracy * values[0])
            assert values[count:].sum() < 1e-6 * values[0]
            cut = (left[:, :2] * values[:2]) @ right[:2]
            if not isinstance(source, Dense):
                np.testing.assert_allclose(product(source, 2), cut, atol=1e-6 * values[0])
            np.testing.assert_allclose(source.rows(3, 5).numpy(), exact[3:8], atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize(("name", "kind"), [("LoHa", LowRank), ("LoKr", Kronecker), ("bare", LowRank)])
def test_structure_is_used_where_there_is_one(name: str, kind: type, tmp_path: Path) -> None:
    with opened(SPELLINGS[name](), tmp_path) as file:
        assert {type(source) for source in matrices(file).values()} == {kind}


def test_a_loha_has_the_product_of_its_ranks(tmp_path: Path) -> None:
    with opened(SPELLINGS["LoHa"](), tmp_path) as file:
        (source,) = matrices(file).values()
        assert len(source.spectrum()) == 9


def test_a_fused_lokr_is_split_where_its_rows_allow_it_and_dense_where_not(tmp_path: Path) -> None:
    for rows, kind in ((12, Kronecker), (16, Dense)):
        one, other = random(rows, 8, seed=1), random(192 // rows, 8, seed=2)
        folder = tmp_path / str(rows)
        folder.mkdir()
        name = "diffusion_model.layers.1.attention.qkv"
        save_file({f"{name}.lokr_w1": one, f"{name}.lokr_w2": other}, folder / "lora.safetensors")
        exact = np.kron(f64(one), f64(other))
        with open_lora(folder / "lora.safetensors") as file:
            found = matrices(file)
            assert {type(source) for source in found.values()} == {kind}
            for i, letter in enumerate("qkv"):
                part = found[f"layers.1.attention.to_{letter}.weight"]
                np.testing.assert_allclose(part.rows(0, 64).numpy(), exact[i * 64 : i * 64 + 64], atol=1e-5)


def test_a_kronecker_product_with_a_negative_strength_keeps_its_sign(tmp_path: Path) -> None:
    written = SPELLINGS["LoKr"]()
    with opened(written, tmp_path) as file:
        ((part, source),) = matrices(file).items()
        assert isinstance(source, Kronecker)
        found = total([(-0.5, source)])
        assert isinstance(found, Kronecker)
        np.testing.assert_allclose(product(found, 64), -0.5 * written.changes[part], atol=1e-5)


def test_a_sum_of_narrow_ones_stays_factored_and_one_with_a_wide_part_becomes_dense() -> None:
    random_ = torch.Generator().manual_seed(0)

    def matrix(width: int) -> LowRank:
        return LowRank(
            torch.randn(64, width, generator=random_, dtype=torch.float64),
            torch.randn(width, 48, generator=random_, dtype=torch.float64),
        )

    one, other = matrix(4), matrix(30)
    wide = Kronecker(torch.randn(8, 6, generator=random_).double(), torch.randn(8, 8, generator=random_).double())
    assert isinstance(total([(1.0, one), (2.0, other)]), LowRank)
    mixed = total([(0.5, one), (-2.0, wide)])
    assert isinstance(mixed, Dense)
    exact = 0.5 * one.rows(0, 64) - 2.0 * torch.kron(wide.first, wide.second)
    np.testing.assert_allclose(mixed.matrix.numpy(), exact.numpy(), atol=1e-5)


def test_rank_0_of_a_dense_matrix_is_nothing_and_not_a_rank_to_be_chosen() -> None:
    found = Dense.of(torch.ones(200, 150)).truncated(0, name="w")
    assert (found.rank, found.total_energy) == (0, pytest.approx(200 * 150))


def test_a_dora_is_refused_with_a_way_out(tmp_path: Path) -> None:
    written = SPELLINGS["diffusion_model, no alpha"]()
    name = "diffusion_model.layers.1.attention.to_q"
    written.tensors[f"{name}.dora_scale"] = torch.ones(64, 1)
    with opened(written, tmp_path) as file, pytest.raises(DataError, match=r"is a DoRA.*mergetool diff"):
        matrices(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    path = SPELLINGS["bare"]().save(tmp_path)
    tensors = load_file(path)
    tensors["layers.1.attention.to_q.lora_A.weight"][0, 0] = value
    save_file(tensors, path)
    with open_lora(path) as file, pytest.raises(NonFiniteError, match=r"layers\.1\.attention\.to_q"):
        matrices(file)
