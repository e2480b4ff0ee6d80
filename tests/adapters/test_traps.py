"""What other tools get wrong when they read or bake a LoRA, a test each, named after the trap."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.lora_file import open_lora
from mergetool.api.merges import Bake
from mergetool.checkpoint.dtypes import F16, F32
from mergetool.engine import job
from mergetool.engine.runs import Outcome
from mergetool.errors import DataError, NonFiniteError
from mergetool.options.merging import MergeOptions
from tests.adapters.files import both
from tests.adapters.spellings import BLOCK, DIM, DOWN, FFN, UP, A, B, f64, fused, musubi_for_comfy, random, split
from tests.families import checkpoint

QKV = [f"{BLOCK}.attention.to_{letter}.weight" for letter in "qkv"]


def model(folder: Path) -> Path:
    path = folder / "base.safetensors"
    return path if path.exists() else checkpoint(path)


def bake(folder: Path, lora: Path, strength: str = "1", *, base: Path | None = None, skip: bool = False,
         **options: object) -> tuple[dict[str, torch.Tensor], Outcome]:  # fmt: skip
    """What `mergetool lora bake` writes, by default in the ComfyUI layout of the base."""
    base = base or model(folder)
    text = Bake(str(base), [f"{lora}:{strength}"]).expression
    with job.open_merge(text, MergeOptions(**options), skip_unmatched=skip) as plan:  # type: ignore[arg-type]
        outcome = job.run_merge(plan, folder / "out.safetensors", overwrite=True)
    return load_file(folder / "out.safetensors"), outcome


def moved(folder: Path, lora: Path, strength: str = "1", **options: object) -> dict[str, np.ndarray]:
    """The change of every parameter under diffusers' names, in float32."""
    base = model(folder)
    with job.open_merge(f"'{base}'", MergeOptions(layout="diffusers", dtype=F32)) as plan:
        job.run_merge(plan, folder / "before.safetensors", overwrite=True)
    after, _ = bake(folder, lora, strength, base=base, layout="diffusers", dtype=F32, **options)
    before = load_file(folder / "before.safetensors")
    return {part: f64(after[part]) - f64(before[part]) for part in before}


def close(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal but for the float32 sum."""
    return bool(np.allclose(found, wanted, rtol=0, atol=4e-6 * max(1.0, np.abs(wanted).max())))


def test_missing_alpha_taken_as_1(tmp_path: Path) -> None:
    """A file without alphas has a scale of 1. Taken as an alpha of 1, the change would be 1 / rank of it."""
    written = split("diffusion_model.", A, B, ranks=(4,))
    found = moved(tmp_path, written.save(tmp_path))
    assert all(close(found[part], change) for part, change in written.changes.items())
    assert not close(found[QKV[0]], written.changes[QKV[0]] / 4)


def test_alpha_x_3_for_fused_qkv(tmp_path: Path) -> None:
    """Block-diagonal factors have three times the rank and the alpha, so the scale of each of q, k and v."""
    written = musubi_for_comfy()
    found = moved(tmp_path, written.save(tmp_path))
    assert all(close(found[part], written.changes[part]) for part in QKV)


def test_q_k_v_fused_order(tmp_path: Path) -> None:
    """The rows of a fused module are q's, then k's, then v's, in either layout of the checkpoint."""
    written = fused("diffusion_model.", DOWN, UP, alpha=8)
    found = moved(tmp_path, written.save(tmp_path))
    assert all(close(found[part], written.changes[part]) for part in QKV)
    native, _ = bake(tmp_path, tmp_path / "lora.safetensors", dtype=F32)
    before = load_file(tmp_path / "base.safetensors")[f"{BLOCK}.attention.qkv.weight"].double().numpy()
    change = f64(native[f"{BLOCK}.attention.qkv.weight"]) - before
    for i, part in enumerate(QKV):
        assert close(change[i * DIM : (i + 1) * DIM], written.changes[part])


def test_refiner_names_not_renamed(tmp_path: Path) -> None:
    """A converter that renames only what has "layers" in it leaves the refiners' output and norms behind."""
    name = "diffusion_model.context_refiner.0.attention.out"
    down, up = random(2, DIM, seed=1), random(DIM, 2, seed=2)
    norm = random(32, seed=3)
    save_file(
        {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            "diffusion_model.noise_refiner.0.attention.q_norm.diff": norm,
        },
        tmp_path / "lora.safetensors",
    )
    found = moved(tmp_path, tmp_path / "lora.safetensors")
    assert close(found["context_refiner.0.attention.to_out.0.weight"], f64(up) @ f64(down))
    assert close(found["noise_refiner.0.attention.norm_q.weight"], f64(norm))


def test_unmatched_lora_keys_ignored(tmp_path: Path) -> None:
    """A key that changes nothing is an error, and left out only when that is asked for, by name."""
    written = split("diffusion_model.", A, B)
    extra = "diffusion_model.layers.1.attention.to_z"
    written.tensors |= {f"{extra}{A}": random(2, DIM, seed=1), f"{extra}{B}": random(DIM, 2, seed=2)}
    lora = written.save(tmp_path)
    with pytest.raises(DataError, match=r"to_z.*2 such keys.*`skip_unmatched`"):
        bake(tmp_path, lora)
    assert not (tmp_path / "out.safetensors").exists()
    with job.open_merge(
        Bake(str(tmp_path / "base.safetensors"), [str(lora)]).expression, MergeOptions(), skip_unmatched=True
    ) as plan:
        assert [name for name, _ in plan.left_out] == [f"{extra}{A}", f"{extra}{B}"]


def test_unloadable_lora_ignored_with_a_warning(tmp_path: Path) -> None:
    """No output without the LoRA: a file that holds none, or half of one, is an error before anything is written."""
    base = checkpoint(tmp_path / "base.safetensors")
    torn = split("diffusion_model.", A, B)
    del torn.tensors[f"diffusion_model.{BLOCK}.attention.to_q{B}"]
    for tensors in (load_file(base), torn.tensors, {"a.weight": torch.zeros(3)}):
        save_file(tensors, tmp_path / "lora.safetensors")
        with pytest.raises(DataError):
            bake(tmp_path, tmp_path / "lora.safetensors", base=base)
    assert not (tmp_path / "out.safetensors").exists()


def test_one_rank_assumed_for_all_alphas(tmp_path: Path) -> None:
    """With mixed ranks and one alpha every module has a scale of its own."""
    written = split("diffusion_model.", DOWN, UP, alpha=8, ranks=(4, 2, 3))
    found = moved(tmp_path, written.save(tmp_path))
    assert all(close(found[part], change) for part, change in written.changes.items())
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert {adapter.scale for adapter in file.adapters} == {2.0, 4.0, 8 / 3}


def test_skip_pattern_deleting_tensors(tmp_path: Path) -> None:
    """What is excluded is in the output, bit for bit."""
    lora = split("diffusion_model.", A, B).save(tmp_path)
    after, _ = bake(tmp_path, lora, exclude=("attention", "refiner"))
    before = load_file(tmp_path / "base.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{BLOCK}.feed_forward.w1.weight", f"{BLOCK}.feed_forward.w2.weight"}


def test_scale_tensors_averaged_as_weights(tmp_path: Path) -> None:
    """A LoRA is added to what codes and scales stand for; a scale is no weight that it could be added to."""
    checkpoint(tmp_path / "plain.safetensors")
    with job.open_merge(f"'{tmp_path / 'plain.safetensors'}'", MergeOptions(quant="fp8-scaled")) as plan:
        job.run_merge(plan, tmp_path / "fp8.safetensors")
    written = split("diffusion_model.", A, B)
    codes = load_file(tmp_path / "fp8.safetensors")
    name = f"{BLOCK}.feed_forward.w1"
    values = f64(codes[f"{name}.weight"].float()) * float(codes[f"{name}.weight_scale"])
    after, _ = bake(tmp_path, written.save(tmp_path), base=tmp_path / "fp8.safetensors", dtype=F32)
    assert not any("scale" in key for key in after)
    assert close(f64(after[f"{name}.weight"]) - values, written.changes[f"{name}.weight"])


def test_fp16_default_overflowing(tmp_path: Path) -> None:
    """bf16 stays bf16, however large a value becomes; fp16 is written when asked for, and then does not overflow in silence."""
    name = f"diffusion_model.{BLOCK}.feed_forward.w1"
    large = {f"{name}{A}": torch.full((1, DIM), 1e3), f"{name}{B}": torch.full((FFN, 1), 1e3)}
    save_file(large, tmp_path / "lora.safetensors")
    after, _ = bake(tmp_path, tmp_path / "lora.safetensors")
    weight = after[f"{BLOCK}.feed_forward.w1.weight"]
    assert weight.dtype == torch.bfloat16
    assert torch.all((weight.float() - 1e6).abs() <= 4096)
    with pytest.raises(NonFiniteError, match="fp16"):
        bake(tmp_path, tmp_path / "lora.safetensors", dtype=F16)


def test_fp8_written_without_scale(tmp_path: Path) -> None:
    """A scaled file that is baked into its own container has a scale that was made for the new values."""
    checkpoint(tmp_path / "plain.safetensors")
    with job.open_merge(f"'{tmp_path / 'plain.safetensors'}'", MergeOptions(quant="fp8-scaled")) as plan:
        job.run_merge(plan, tmp_path / "fp8.safetensors")
    written = split("diffusion_model.", A, B)
    lora = written.save(tmp_path)
    after, _ = bake(tmp_path, lora, "100", base=tmp_path / "fp8.safetensors", quant="fp8-scaled")
    name = f"{BLOCK}.feed_forward.w1"
    codes = load_file(tmp_path / "fp8.safetensors")
    exact = (
        f64(codes[f"{name}.weight"].float()) * float(codes[f"{name}.weight_scale"])
        + 100 * written.changes[f"{name}.weight"]
    )
    stored = f64(after[f"{name}.weight"].float()) * float(after[f"{name}.weight_scale"])
    assert after[f"{name}.weight"].dtype == torch.float8_e4m3fn
    # half a step of 3 mantissa bits, and of the subnormals below 2^-6 of 448
    assert np.all(np.abs(stored - exact) <= np.abs(exact) / 16 + np.abs(exact).max() / 448 * 2**-10 * 1.001)


def test_subtraction_in_bf16(tmp_path: Path) -> None:
    """Taking a LoRA away is one float32 operation and one rounding, not a rounded product and a rounded difference."""
    written = split("diffusion_model.", A, B)
    after, _ = bake(tmp_path, written.save(tmp_path), "-0.3", layout="diffusers")
    with job.open_merge(f"'{tmp_path / 'base.safetensors'}'", MergeOptions(layout="diffusers")) as plan:
        job.run_merge(plan, tmp_path / "before.safetensors")
    before = load_file(tmp_path / "before.safetensors")
    part = f"{BLOCK}.feed_forward.w1.weight"
    exact = f64(before[part]) - 0.3 * written.changes[part]
    once = torch.from_numpy(exact).bfloat16()
    twice = before[part] - torch.from_numpy(0.3 * written.changes[part]).bfloat16()
    assert (after[part] != once).float().mean() < 1e-3  # ties, and what the float32 product is off by
    assert (after[part] != twice).float().mean() > 0.05


@pytest.mark.parametrize("strength", ["0", "0.0", "-0"])
def test_falsy_0_treated_as_unset(tmp_path: Path, strength: str) -> None:
    """A strength of 0 adds nothing, and an alpha of 0 is one; neither is 1."""
    written = split("diffusion_model.", A, B)
    lora = written.save(tmp_path)
    assert Bake("m", [f"{lora}:{strength}"]).expression.count(f"0 * lora({str(lora)!r})") == 1
    after, _ = bake(tmp_path, lora, strength)
    before = load_file(tmp_path / "base.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    silent = split("diffusion_model.", A, B, alpha=0)
    found = moved(tmp_path, silent.save(tmp_path))
    assert not any(change.any() for change in found.values())
    with job.open_merge(
        Bake(str(tmp_path / "base.safetensors"), [str(lora)]).expression,
        MergeOptions(multipliers=(("ffn", Fraction(0)),)),
    ) as plan:
        steps = {step.part: step.reason for tensor in plan.tensors for step in tensor.steps}
    assert steps[f"{BLOCK}.feed_forward.w1.weight"] == "`multipliers` to 0"


def test_both_fused_and_split_keys_in_one_file(tmp_path: Path) -> None:
    """Programs differ in which they take: it is an error that names both, and a warning for who only looks."""
    lora = both("diffusion_model.", "diffusion_model.", DOWN, UP).save(tmp_path)
    with pytest.raises(DataError, match=r"to_out\.0.*2 times, by .*attention\.out\" and .*attention\.to_out\.0\""):
        bake(tmp_path, lora)
    with open_lora(lora) as file:
        assert any("changed twice" in warning and "attention.out" in warning for warning in file.warnings)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [A, B])
def test_nan_factors(tmp_path: Path, value: float, key: str) -> None:
    """NaN names its module, and nothing is written."""
    written = split("diffusion_model.", A, B)
    written.tensors[f"diffusion_model.{BLOCK}.attention.to_k{key}"][1, 1] = value
    with pytest.raises(NonFiniteError, match=r"attention\.to_k"):
        bake(tmp_path, written.save(tmp_path))
    assert not (tmp_path / "out.safetensors").exists()


def test_zero_factors(tmp_path: Path) -> None:
    """An untrained LoRA, whose up is zero, changes no bit."""
    written = split("diffusion_model.", A, B)
    zeros = {key: torch.zeros_like(tensor) if key.endswith(B) else tensor for key, tensor in written.tensors.items()}
    save_file(zeros, tmp_path / "lora.safetensors")
    after, _ = bake(tmp_path, tmp_path / "lora.safetensors")
    before = load_file(tmp_path / "base.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("shape", [(), (4,), (0, 4)])
def test_whole_factors_of_a_kronecker_product_are_matrices(tmp_path: Path, shape: tuple[int, ...]) -> None:
    name = "diffusion_model.layers.0.attention.to_q"
    factors = {f"{name}.lokr_w1": torch.ones(shape), f"{name}.lokr_w2": torch.ones(4, 4)}
    save_file(factors, tmp_path / "lokr.safetensors")
    with (
        pytest.raises(DataError, match=r"has a factor of shape .*, where a matrix"),
        open_lora(tmp_path / "lokr.safetensors"),
    ):
        pass
