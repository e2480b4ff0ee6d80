"""A DoRA's change depends on the weight: held against its definition in float64, and against PEFT's own merge."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F32
from mergetool.engine import job
from mergetool.errors import DataError, NonFiniteError
from mergetool.options.merging import MergeOptions
from tests.adapters.spellings import BLOCK, DIM, FFN, f64, random
from tests.families import checkpoint

EPSILON = 2.0**-23
PLAIN = f"{BLOCK}.feed_forward.w1"  # [FFN, DIM]
FUSED = f"{BLOCK}.attention.qkv"
QKV = [f"{BLOCK}.attention.to_{letter}.weight" for letter in "qkv"]


def definition(weight: np.ndarray, product: np.ndarray, magnitudes: np.ndarray) -> np.ndarray:
    """W' - W of a matrix, magnitudes [out, 1] or [1, in]."""
    moved = weight + product
    axis = 1 if magnitudes.shape[1] == 1 else 0
    return magnitudes * moved / (np.linalg.norm(moved, axis=axis, keepdims=True) + EPSILON) - weight


def baked(
    folder: Path, lora: Path, factor: str, **options: object
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The float32 weights before and after, under diffusers' names."""
    base = folder / "base.safetensors"
    if not base.exists():
        checkpoint(base)
    chosen = MergeOptions(layout="diffusers", dtype=F32, **options)  # type: ignore[arg-type]
    for name, expression in (("before", f"'{base}'"), ("after", f"'{base}' + {factor} * lora('{lora}')")):
        with job.open_merge(expression, chosen) as plan:
            job.run_merge(plan, folder / f"{name}.safetensors", overwrite=True)
    return load_numpy(folder / "before.safetensors"), load_numpy(folder / "after.safetensors")


def written(
    folder: Path, module: str, rows: int, scale: torch.Tensor, *, alpha: float = 2.0
) -> tuple[Path, np.ndarray]:
    """A LoRA of rank 4 with magnitudes, and its scaled product."""
    down, up = random(4, DIM, seed=1), random(rows, 4, seed=2)
    name = f"diffusion_model.{module}"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": scale}
    tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, folder / "dora.safetensors")
    return folder / "dora.safetensors", f64(up) @ f64(down) * alpha / 4


@pytest.mark.parametrize("shape", [(FFN, 1), (FFN,), (1, DIM)], ids=["rows", "rows, a vector", "columns"])
@pytest.mark.parametrize("factor", [1.0, 0.5, -2.0])
def test_a_dora_is_its_definition_and_strength_multiplies_the_change(
    tmp_path: Path, shape: tuple[int, ...], factor: float
) -> None:
    scale = random(*shape, seed=3).abs() + 1
    lora, product = written(tmp_path, PLAIN, FFN, scale)
    before, after = baked(tmp_path, lora, str(factor) if factor > 0 else f"({factor})")
    weight = before[f"{PLAIN}.weight"].astype(np.float64)
    exact = weight + factor * definition(weight, product, f64(scale) if scale.ndim == 2 else f64(scale)[:, None])
    # the product's 4 terms, the change and the sum are each rounded once to float32
    np.testing.assert_allclose(after[f"{PLAIN}.weight"], exact, rtol=4 * 2**-24, atol=16 * 2**-24 * np.abs(exact).max())
    assert all(np.array_equal(before[part], after[part]) for part in before if part != f"{PLAIN}.weight")


@pytest.mark.parametrize("shape", [(3 * DIM, 1), (1, DIM)], ids=["rows", "columns"])
def test_a_fused_doras_magnitudes_are_of_all_the_rows_it_holds(tmp_path: Path, shape: tuple[int, int]) -> None:
    scale = random(*shape, seed=3).abs() + 1
    lora, product = written(tmp_path, FUSED, 3 * DIM, scale)
    before, after = baked(tmp_path, lora, "1")
    weight = np.concatenate([before[part] for part in QKV]).astype(np.float64)
    exact = weight + definition(weight, product, f64(scale))
    found = np.concatenate([after[part] for part in QKV])
    np.testing.assert_allclose(found, exact, rtol=4 * 2**-24, atol=16 * 2**-24 * np.abs(exact).max())


@pytest.mark.parametrize("quant", ["fp8-scaled", "int8"])
def test_the_weight_is_what_a_quantised_model_decodes_to(tmp_path: Path, quant: str) -> None:
    checkpoint(tmp_path / "plain.safetensors")
    with job.open_merge(f"'{tmp_path / 'plain.safetensors'}'", MergeOptions(quant=quant)) as plan:
        job.run_merge(plan, tmp_path / "base.safetensors")
    scale = random(FFN, 1, seed=3).abs() + 1
    lora, product = written(tmp_path, PLAIN, FFN, scale)
    before, after = baked(tmp_path, lora, "1")
    weight = before[f"{PLAIN}.weight"].astype(np.float64)
    exact = weight + definition(weight, product, f64(scale))
    np.testing.assert_allclose(after[f"{PLAIN}.weight"], exact, rtol=4 * 2**-24, atol=16 * 2**-24 * np.abs(exact).max())


def test_a_row_of_zeros_stays_zero_instead_of_nan(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base.safetensors")
    tensors = load_file(tmp_path / "base.safetensors")
    tensors[f"{PLAIN}.weight"][5] = 0
    save_file(tensors, tmp_path / "base.safetensors")
    lora, _ = written(tmp_path, PLAIN, FFN, torch.ones(FFN, 1))
    factors = load_file(lora)
    factors[f"diffusion_model.{PLAIN}.lora_up.weight"][5] = 0
    save_file(factors, lora)
    _, after = baked(tmp_path, lora, "1")
    assert not after[f"{PLAIN}.weight"][5].any()


def test_peft_merges_the_same_dora(tmp_path: Path) -> None:
    """PEFT's merge of a DoRA on the same float32 weight, its file as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    base = checkpoint(tmp_path / "base.safetensors", dtype=F32)
    weight = load_file(base)[f"{PLAIN}.weight"]

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = torch.nn.Linear(DIM, FFN, bias=False)

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    model.layers[1].feed_forward = Block()
    with torch.no_grad():
        model.layers[1].feed_forward.w1.weight.copy_(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=["w1"], use_dora=True))
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.rand_like(parameter) + (0.5 if "magnitude" in name else -0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.save_pretrained(tmp_path / "peft")
    assert any("lora_magnitude_vector" in key for key in load_file(tmp_path / "peft" / "adapter_model.safetensors"))
    _, after = baked(tmp_path, tmp_path / "peft", "1")
    theirs = peft.merge_and_unload().layers[1].feed_forward.w1.weight.detach().numpy()
    # PEFT rounds the product, the sum, the norm (of 64 squares), the quotient and the result to float32, and has no eps
    np.testing.assert_allclose(after[f"{PLAIN}.weight"], theirs, rtol=0, atol=32 * 2**-24 * np.abs(theirs).max())
    moved = np.abs(theirs - weight.numpy()).max()
    assert moved > 1e4 * np.abs(after[f"{PLAIN}.weight"] - theirs).max()


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    lora, _ = written(tmp_path, FUSED, 3 * DIM, random(1, DIM, seed=3).abs() + 1)
    base = checkpoint(tmp_path / "base.safetensors")
    found = set()
    for threads in (1, 3):
        with job.open_merge(f"'{base}' + lora('{lora}')", MergeOptions()) as plan:
            job.run_merge(plan, tmp_path / "out.safetensors", threads=threads, overwrite=True)
        found.add((tmp_path / "out.safetensors").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("shape", [(FFN - 1, 1), (1, DIM + 1), (2, FFN // 2)])
def test_magnitudes_of_neither_rows_nor_columns_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    lora, _ = written(tmp_path, PLAIN, FFN, torch.ones(shape))
    with pytest.raises(DataError, match=r"dora_scale.*\[170, 1\] for rows or \[1, 64\] for columns"):
        baked(tmp_path, lora, "1")


def test_a_nan_among_magnitudes_or_factors_names_the_module(tmp_path: Path) -> None:
    scale = torch.ones(FFN, 1)
    scale[7] = torch.nan
    lora, _ = written(tmp_path, PLAIN, FFN, scale)
    with pytest.raises(NonFiniteError, match="dora_scale"):
        baked(tmp_path, lora, "1")
    lora, _ = written(tmp_path, PLAIN, FFN, torch.ones(FFN, 1))
    factors = load_file(lora)
    factors[f"diffusion_model.{PLAIN}.lora_down.weight"][0, 0] = torch.inf
    save_file(factors, lora)
    with pytest.raises(NonFiniteError, match=r"feed_forward\.w1"):
        baked(tmp_path, lora, "1")
