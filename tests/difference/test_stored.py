"""A threshold is met by the factors that are in the file, not only by those before they were rounded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import BF16, F16, F32, DType
from mergetool.difference.extract import Extraction, extract, open_diff
from mergetool.lowrank.decomposition import Decomposition, exact_decomposition
from mergetool.lowrank.promise import stricter
from mergetool.ops.tensors import TORCH
from mergetool.options.differences import DiffOptions
from tests.lowrank.contract import with_spectrum

NAME = "layers.0.w.weight"
VALUES = 0.97 ** np.arange(90.0)
SPECTRUM = VALUES**2 / (VALUES**2).sum()
DEVICES = [None, torch.device("cpu")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generic model of one matrix, zero, and one with 90 directions that fall slowly."""
    folder = tmp_path_factory.mktemp("pair")
    delta = with_spectrum(300, 200, VALUES)
    save_file({NAME: torch.zeros_like(delta)}, folder / "base.safetensors")
    save_file({NAME: delta}, folder / "variant.safetensors")
    return folder


def diff(
    pair: Path, output: Path, device: torch.device | None = None, spectra: Path | None = None, **options: object
) -> Extraction:
    chosen = DiffOptions(**{"rank_max": 0, "spectra": spectra, **options})  # type: ignore[arg-type]
    with open_diff(str(pair / "base.safetensors"), str(pair / "variant.safetensors"), chosen) as pairing:
        return extract(pairing, output, chosen, device=device)


def stored_energy(pair: Path, lora: Path) -> float:
    """1 - ||delta - up down||^2 / ||delta||^2 in float64, from the files."""
    truth = load_file(pair / "variant.safetensors")[NAME].double()
    found = load_file(lora)
    (up,) = (value.double() for key, value in found.items() if ".lora_B." in key)
    (down,) = (value.double() for key, value in found.items() if ".lora_A." in key)
    return 1 - float((truth - up @ down).square().sum() / truth.square().sum())


def just_reached(rank: int) -> float:
    """A threshold that ``rank`` exact directions reach by less than bf16 rounds away."""
    return float(SPECTRUM[:rank].sum()) - 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [3, 20, 50])
def test_one_direction_more_where_rounding_takes_the_pair_below_the_threshold(
    pair: Path, tmp_path: Path, rank: int, device: torch.device | None
) -> None:
    threshold = just_reached(rank)
    (exact,) = diff(pair, tmp_path / "exact.safetensors", device, rank_thresh=threshold, dtype=F32).layers
    (found,) = diff(pair, tmp_path / "lora.safetensors", device, rank_thresh=threshold).layers
    assert (exact.rank, found.rank, found.missed) == (rank, rank + 1, False)
    assert stored_energy(pair, tmp_path / "lora.safetensors") >= threshold


def test_the_same_by_the_frobenius_norm_and_from_a_side_file(pair: Path, tmp_path: Path) -> None:
    threshold = just_reached(20) ** 0.5
    side = tmp_path / "spectra.safetensors"
    for name in ("first", "second"):
        found = diff(pair, tmp_path / f"{name}.safetensors", None, side, rule="fro", rank_thresh=threshold)
        assert found.layers[0].rank == 21
        assert stored_energy(pair, tmp_path / f"{name}.safetensors") >= threshold**2


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 0.9999])
def test_every_threshold_that_a_dtype_can_hold_is_held_by_the_file(
    pair: Path, tmp_path: Path, threshold: float, dtype: DType
) -> None:
    (found,) = diff(pair, tmp_path / "lora.safetensors", rank_thresh=threshold, dtype=dtype).layers
    assert not found.missed
    assert stored_energy(pair, tmp_path / "lora.safetensors") >= threshold
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora.safetensors").values()} == {TORCH[dtype]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.999999, 1.0])
def test_a_threshold_that_bf16_cannot_hold_is_named_and_not_chased(
    pair: Path, tmp_path: Path, threshold: float, device: torch.device | None
) -> None:
    (found,) = diff(pair, tmp_path / "lora.safetensors", device, rank_thresh=threshold).layers
    (exact,) = diff(pair, tmp_path / "exact.safetensors", device, rank_thresh=threshold, dtype=F32).layers
    assert found.missed
    assert found.rank == exact.rank
    assert stored_energy(pair, tmp_path / "lora.safetensors") < threshold


def test_a_cap_comes_before_the_promise(pair: Path, tmp_path: Path) -> None:
    (found,) = diff(pair, tmp_path / "lora.safetensors", rank_thresh=just_reached(20), rank_max=20).layers
    assert (found.rank, found.capped, found.missed) == (20, True, False)


def test_a_fixed_rank_promises_no_energy(pair: Path, tmp_path: Path) -> None:
    (found,) = diff(pair, tmp_path / "lora.safetensors", rank=90).layers
    assert (found.rank, found.missed) == (90, False)


def holding(share: float) -> Decomposition:
    """One of two directions, which holds this share of the energy."""
    values = torch.tensor([share, 1 - share], dtype=torch.float64).sqrt()
    return exact_decomposition(torch.eye(2), values, torch.eye(2), 1, name="w")


def test_a_stricter_rule_adds_what_rounding_took() -> None:
    assert stricter(0.9, holding(0.91), (1 - 0.9) ** 0.5) is None
    again = stricter(0.9, holding(0.9001), (1 - 0.8999) ** 0.5)
    assert again is not None
    assert (again.name, again.threshold) == ("energy", pytest.approx(0.9 + 1.1 * 2e-4))
    assert stricter(0.99999, holding(0.999995), (1 - 0.99998) ** 0.5) is None
