"""base + LoRA against tuned: residuals by the definition in float64, on real files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F32
from mergetool.difference.extract import extract, open_diff
from mergetool.engine import job
from mergetool.errors import DataError, FamilyError, NonFiniteError
from mergetool.lora import verify
from mergetool.lora.verify import LoraReport, open_check, verify_lora, worst
from mergetool.options.differences import DiffOptions
from mergetool.options.merging import MergeOptions
from tests.adapters.spellings import BLOCK, DIM, SPELLINGS
from tests.families import checkpoint


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, tuned, and the LoRA between them, of rank 6."""
    folder = tmp_path_factory.mktemp("family")
    checkpoint(folder / "base.safetensors", layout="diffusers")
    checkpoint(folder / "tuned.safetensors", variant=1)
    options = DiffOptions(rank=6)
    with open_diff(str(folder / "base.safetensors"), str(folder / "tuned.safetensors"), options) as pairing:
        extract(pairing, folder / "lora.safetensors", options)
    return folder


def verified(folder: Path, lora: str = "lora.safetensors", *, base: str = "base.safetensors", tuned: str = "tuned.safetensors",
             strength: Fraction = Fraction(1), threads: int | None = None) -> LoraReport:  # fmt: skip
    with open_check(str(folder / base), str(folder / lora), str(folder / tuned), strength=strength) as comparison:
        return verify_lora(comparison, threads=threads)


def weights(path: Path) -> dict[str, np.ndarray]:
    """Every parameter in float64 under diffusers' names."""
    with job.open_merge(f"'{path}'", MergeOptions(layout="diffusers", dtype=F32)) as plan:
        job.run_merge(plan, path.parent / "plain.safetensors", overwrite=True)
    return {name: tensor.double().numpy() for name, tensor in load_file(path.parent / "plain.safetensors").items()}


@pytest.mark.parametrize("strength", [Fraction(1), Fraction(-1, 2)])
def test_residuals_are_those_of_the_definition(family: Path, strength: Fraction) -> None:
    base, tuned, lora = (weights(family / "base.safetensors"), weights(family / "tuned.safetensors"), load_file(family / "lora.safetensors"))  # fmt: skip
    report = verified(family, strength=strength)
    assert {one.part for one in report.residuals} == set(base)
    squares = np.zeros(3)
    for one in report.residuals:
        delta, change = tuned[one.part] - base[one.part], np.zeros_like(base[one.part])
        key = f"diffusion_model.{one.part.removesuffix('.weight')}"
        assert one.changed == (f"{key}.lora_A.weight" in lora)
        if one.changed:
            up, down = (lora[f"{key}.lora_{x}.weight"].double().numpy() for x in "BA")
            change = float(strength) * up @ down
        stored = torch.from_numpy((base[one.part] + change).astype(np.float32)).bfloat16().double().numpy()
        left = [(array**2).sum() for array in (delta, delta - change, tuned[one.part] - stored)]
        np.testing.assert_allclose([one.delta, one.before, one.after], left, rtol=1e-4, atol=1e-12, err_msg=one.part)
        squares += left
    assert report.total() == pytest.approx((squares[1] / squares[0]) ** 0.5, rel=1e-5)
    assert report.total(after=True) == pytest.approx((squares[2] / squares[0]) ** 0.5, rel=1e-5)


def test_what_is_after_rounding_is_what_bake_writes(family: Path) -> None:
    with job.open_merge(
        f"'{family / 'base.safetensors'}' + 1/2 * lora('{family / 'lora.safetensors'}')", MergeOptions()
    ) as plan:
        job.run_merge(plan, family / "baked.safetensors", overwrite=True)
    report = verified(family, tuned="baked.safetensors", strength=Fraction(1, 2))
    assert sum(one.after for one in report.residuals) == 0
    assert report.total() > 0
    assert report.total(after=True) == 0


def test_a_strength_of_zero_leaves_the_whole_difference(family: Path) -> None:
    report = verified(family, strength=Fraction(0))
    assert report.total() == report.total(after=True) == 1


@pytest.mark.parametrize("spelling", list(SPELLINGS))
def test_every_spelling_is_compared(tmp_path: Path, spelling: str) -> None:
    written = SPELLINGS[spelling]()
    checkpoint(tmp_path / "base.safetensors", dtype=F32, layout="diffusers")
    tensors = load_file(tmp_path / "base.safetensors")
    for part, change in written.changes.items():
        tensors[part] = (tensors[part].double() + torch.from_numpy(change).view(tensors[part].shape)).float()
    save_file(tensors, tmp_path / "tuned.safetensors")
    path = written.save(tmp_path)
    report = verified(tmp_path, path.relative_to(tmp_path).as_posix())
    assert {one.part for one in report.residuals if one.changed} == set(written.changes)
    assert report.total() < 1e-5
    assert {one.program for one in report.loading} == {"diffusers", "ComfyUI"}


@pytest.mark.parametrize("spelling", ["LoKr, decomposed, alpha", "LoHa", "ComfyUI differences", "musubi"])
def test_a_strength_multiplies_changes_of_every_kind(tmp_path: Path, spelling: str) -> None:
    written = SPELLINGS[spelling]()
    base, lora = checkpoint(tmp_path / "base.safetensors", dtype=F32), written.save(tmp_path)
    with job.open_merge(f"'{base}' - 0.3 * lora('{lora}')", MergeOptions()) as plan:
        job.run_merge(plan, tmp_path / "tuned.safetensors")
    report = verified(tmp_path, lora.name, strength=Fraction(-3, 10))
    assert report.total() < 1e-5
    assert verified(tmp_path, lora.name).total() == pytest.approx(1.3 / 0.3, rel=1e-3)


def test_a_quantised_base_is_baked_into_bf16(family: Path) -> None:
    with job.open_merge(f"'{family / 'base.safetensors'}'", MergeOptions(quant="fp8-scaled")) as plan:
        job.run_merge(plan, family / "fp8.safetensors", overwrite=True)
    with job.open_merge(
        f"'{family / 'fp8.safetensors'}' + lora('{family / 'lora.safetensors'}')", MergeOptions()
    ) as plan:
        job.run_merge(plan, family / "from-fp8.safetensors", overwrite=True)
    report = verified(family, base="fp8.safetensors", tuned="from-fp8.safetensors")
    assert report.total(after=True) == 0


def test_the_report_does_not_depend_on_threads_or_tiles(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, three = verified(family, threads=1), verified(family, threads=3)
    assert one == three
    monkeypatch.setattr(verify, "TILE", 64 * DIM)
    small = verified(family, threads=1)
    for found, other in zip(one.residuals, small.residuals, strict=True):
        assert found.after == pytest.approx(other.after, rel=1e-6)


def test_the_worst_are_those_with_the_most_left(family: Path) -> None:
    report = verified(family)
    assert [one.after for one in worst(report.residuals, 3)] == sorted(one.after for one in report.residuals)[:-4:-1]


def test_parameters_of_one_model_only_are_named(family: Path, tmp_path: Path) -> None:
    tensors = load_file(family / "tuned.safetensors")
    tensors["extra.weight"] = torch.zeros(3)
    del tensors["cap_pad_token"]
    save_file(tensors, family / "other.safetensors")
    report = verified(family, tuned="other.safetensors")
    assert [name for name, _ in report.left_out] == ["cap_pad_token", "extra.weight"]


def test_keys_that_change_nothing_are_named(family: Path) -> None:
    tensors = load_file(family / "lora.safetensors")
    tensors["diffusion_model.layers.77.attention.to_q.lora_A.weight"] = torch.zeros(2, DIM)
    tensors["diffusion_model.layers.77.attention.to_q.lora_B.weight"] = torch.zeros(DIM, 2)
    save_file(tensors, family / "more.safetensors")
    report = verified(family, "more.safetensors")
    assert len(report.unmatched) == 2
    assert "layers.77" in report.unmatched[0][0]


@pytest.mark.parametrize("which", ["base", "tuned"])
def test_a_nan_names_the_parameter(family: Path, which: str) -> None:
    tensors = load_file(family / f"{which}.safetensors")
    name = f"{BLOCK}.feed_forward.w2.weight"
    tensors[name][1, 2] = torch.nan
    save_file(tensors, family / "nan.safetensors")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.feed_forward\.w2\.weight"):
        verified(family, **{which: "nan.safetensors"})  # type: ignore[arg-type]


def test_models_of_other_shapes_are_refused(family: Path) -> None:
    tensors = load_file(family / "tuned.safetensors")
    tensors[f"{BLOCK}.feed_forward.w2.weight"] = torch.zeros(4, 4, dtype=torch.bfloat16)
    save_file(tensors, family / "small.safetensors")
    with pytest.raises(FamilyError, match=r"\[4, 4\]"):
        verified(family, tuned="small.safetensors")


def test_a_file_that_is_no_lora_is_refused(family: Path) -> None:
    with pytest.raises(DataError, match="keys of a LoRA"):
        verified(family, "tuned.safetensors")
