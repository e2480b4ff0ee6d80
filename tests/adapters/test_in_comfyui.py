"""What the real ComfyUI adds to a weight, beside what mergetool adds: kinds of adapters and spellings that no Z-Image model of the tests has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters import unmatched
from mergetool.adapters.convert import convert
from mergetool.adapters.dora_in_comfyui import difference
from mergetool.adapters.lora_file import open_lora
from mergetool.arch import recognise
from mergetool.checkpoint.reader import Checkpoint
from tests.adapters.spellings import DOWN, UP, f64, random
from tests.adapters.test_traps import bake
from tests.oracles import ComfyUI

OUT, IN = 12, 8
NAME = "blocks.0.q"


def base(folder: Path, **shapes: tuple[int, ...]) -> Path:
    """A model of an unknown family with weights in float32."""
    shapes = shapes or {f"{NAME}.weight": (OUT, IN)}
    save_file(
        {name: 4 * random(*s, seed=i).float() for i, (name, s) in enumerate(shapes.items())},
        folder / "base.safetensors",
    )
    return folder / "base.safetensors"


def in_comfyui(comfyui: ComfyUI, folder: Path, lora: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """The tensors of the base after ComfyUI added the LoRA."""
    out = folder / "theirs.safetensors"
    comfyui.ask("add", weights=folder / "base.safetensors", lora=lora, out=out, strength=strength)
    return load_file(out)


def said(folder: Path) -> tuple[str, ...]:
    """The remarks on the LoRA in the plan of adding it to the base."""
    with Checkpoint.open(folder / "base.safetensors") as checkpoint:
        anatomy = recognise(checkpoint.tensors, source="base")
        with open_lora(folder / "lora.safetensors", anatomy=anatomy) as file:
            return unmatched.remarks(file)


def dora(folder: Path, scale: torch.Tensor) -> Path:
    tensors = {f"{NAME}{DOWN}": random(2, IN, seed=11).float(), f"{NAME}{UP}": random(OUT, 2, seed=12).float()}
    save_file(tensors | {f"{NAME}.alpha": torch.tensor(3.0), f"{NAME}.dora_scale": scale}, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_a_dora_by_channels_is_the_same_in_comfyui(comfyui: ComfyUI, tmp_path: Path, strength: float) -> None:
    model, lora = base(tmp_path), dora(tmp_path, random(1, IN, seed=3).float().abs() + 1)
    theirs = in_comfyui(comfyui, tmp_path, lora, strength)
    ours, _ = bake(tmp_path, lora, str(strength), base=model)
    torch.testing.assert_close(ours[f"{NAME}.weight"], theirs[f"{NAME}.weight"], rtol=1e-6, atol=1e-6)


def test_how_far_comfyuis_dora_by_rows_is_from_trainings_is_measured_right(comfyui: ComfyUI, tmp_path: Path) -> None:
    model, lora = base(tmp_path), dora(tmp_path, random(OUT, 1, seed=3).float().abs() + 1)
    before = f64(load_file(model)[f"{NAME}.weight"])
    theirs = f64(in_comfyui(comfyui, tmp_path, lora)[f"{NAME}.weight"])
    ours = f64(bake(tmp_path, lora, base=model)[0][f"{NAME}.weight"])
    with Checkpoint.open(model) as checkpoint:
        anatomy = recognise(checkpoint.tensors, source="base")
        with open_lora(lora, anatomy=anatomy) as file:
            found = difference(file, anatomy, checkpoint)
            assert any("by rows" in warning for warning in file.warnings)
    assert found is not None
    share = np.linalg.norm(theirs - ours) / np.linalg.norm(ours - before)
    assert (found.parts, found.part) == (1, f"{NAME}.weight")
    assert found.share == pytest.approx(share, rel=1e-5)
    assert share > 0.01


def test_comfyui_cannot_apply_magnitudes_of_one_dimension(comfyui: ComfyUI, tmp_path: Path) -> None:
    """Which is why they are warned of, and written as a column."""
    base(tmp_path)
    lora = dora(tmp_path, torch.ones(OUT))
    theirs = in_comfyui(comfyui, tmp_path, lora)
    assert torch.equal(theirs[f"{NAME}.weight"], load_file(tmp_path / "base.safetensors")[f"{NAME}.weight"])
    with open_lora(lora) as file:
        assert any("1 magnitudes are vectors" in warning for warning in file.warnings)


def test_a_norm_of_lycoris_is_added_as_comfyui_adds_it(comfyui: ComfyUI, tmp_path: Path) -> None:
    model = base(tmp_path, **{"blocks.0.norm.weight": (IN,), "blocks.0.norm.bias": (IN,)})
    tensors = {"blocks.0.norm.w_norm": random(IN, seed=5).float(), "blocks.0.norm.b_norm": random(IN, seed=6).float()}
    save_file(tensors, tmp_path / "lora.safetensors")
    theirs = in_comfyui(comfyui, tmp_path, tmp_path / "lora.safetensors", 0.5)
    ours, _ = bake(tmp_path, tmp_path / "lora.safetensors", "0.5", base=model)
    for name in ("blocks.0.norm.weight", "blocks.0.norm.bias"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


def test_xlabs_processors_are_the_modules_that_comfyui_takes_them_for(comfyui: ComfyUI, tmp_path: Path) -> None:
    """ComfyUI renames such files where they have all blocks of Flux.1 (comfy/lora_convert.py)."""
    blocks = ["double_blocks.0", "double_blocks.18"]
    sizes = {"img_attn.qkv": 3 * IN, "img_attn.proj": IN, "txt_attn.qkv": 3 * IN, "txt_attn.proj": IN}
    shapes = {f"diffusion_model.{block}.{name}.weight": (rows, IN) for block in blocks for name, rows in sizes.items()}
    shapes["diffusion_model.single_blocks.37.linear2.weight"] = (IN, 5 * IN)
    model = base(tmp_path, **shapes)
    tensors = {}
    factors = [("qkv_lora1", 3 * IN), ("qkv_lora2", 3 * IN), ("proj_lora1", IN), ("proj_lora2", IN)]
    for i, (name, rows) in enumerate(factors):
        for block in blocks:
            key = f"{block}.processor.{name}"
            tensors |= {f"{key}.down.weight": random(2, IN, seed=i), f"{key}.up.weight": random(rows, 2, seed=i + 20)}
    single = "single_blocks.37.processor"
    tensors |= {f"{single}.qkv_lora.down.weight": random(2, IN, seed=50), f"{single}.qkv_lora.up.weight": random(3 * IN, 2, seed=51),
                f"{single}.proj_lora.down.weight": random(2, 5 * IN, seed=52), f"{single}.proj_lora.up.weight": random(IN, 2, seed=53)}  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    theirs = in_comfyui(comfyui, tmp_path, tmp_path / "lora.safetensors")
    ours, _ = bake(tmp_path, tmp_path / "lora.safetensors", base=model, skip=True)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert not torch.equal(ours[name], load_file(model)[name])
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_whole_weight_takes_the_models_place_at_any_strength(
    comfyui: ComfyUI, tmp_path: Path, strength: float
) -> None:
    model = base(
        tmp_path, **{f"{NAME}.weight": (OUT, IN), "blocks.0.norm.weight": (IN,), "blocks.0.k.weight": (OUT, IN)}
    )
    tensors = {
        f"{NAME}.set_weight": random(OUT, IN, seed=5).float(),
        "blocks.0.norm.set_weight": random(IN, seed=6).float(),
        f"blocks.0.k{DOWN}": random(2, IN, seed=7).float(),
        f"blocks.0.k{UP}": random(OUT, 2, seed=8).float(),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    theirs = in_comfyui(comfyui, tmp_path, tmp_path / "lora.safetensors", strength)
    ours, _ = bake(tmp_path, tmp_path / "lora.safetensors", str(strength), base=model)
    assert torch.equal(theirs[f"{NAME}.weight"], tensors[f"{NAME}.set_weight"])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-6, atol=1e-6)
    assert any("2 weights of" in remark and "whatever its strength" in remark for remark in said(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reshaped_weight_gets_columns_of_zeros_as_in_comfyui(
    comfyui: ComfyUI, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = base(tmp_path, **{f"{NAME}.weight": (OUT, IN), "blocks.0.k.weight": (OUT, IN)})
    save_file({name: value.to(dtype) for name, value in load_file(model).items()}, model)
    tensors = {
        f"{NAME}.lora_A.weight": random(2, 2 * IN, seed=7).float(),
        f"{NAME}.lora_B.weight": random(OUT, 2, seed=8).float(),
    }
    save_file(tensors | {f"{NAME}.reshape_weight": torch.tensor([OUT, 2 * IN])}, tmp_path / "lora.safetensors")
    theirs = in_comfyui(comfyui, tmp_path, tmp_path / "lora.safetensors", 0.5)
    ours, _ = bake(tmp_path, tmp_path / "lora.safetensors", "0.5", base=model)
    assert ours[f"{NAME}.weight"].shape == (OUT, 2 * IN)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value.to(dtype), rtol=1e-6, atol=1e-6)
    assert any(f"wants {2 * IN} columns" in remark for remark in said(tmp_path))


def test_a_control_lora_of_flux_is_written_as_comfyui_reads_it(comfyui: ComfyUI, tmp_path: Path) -> None:
    """Black Forest Labs' names, of which ComfyUI makes others (comfy/lora_convert.py): norms stand in the model's place, img_in is wider."""
    norm, single = "double_blocks.0.img_attn.norm.query_norm", "single_blocks.0.norm.key_norm"
    model = base(
        tmp_path,
        **{f"diffusion_model.{name}.weight": (16,) for name in (norm, single)},
        **{"diffusion_model.img_in.weight": (OUT, 64), "diffusion_model.img_in.bias": (OUT,)},
    )
    tensors = {
        "img_in.lora_A.weight": random(2, 128, seed=7).float(), "img_in.lora_B.weight": random(OUT, 2, seed=8).float(),
        "img_in.lora_B.bias": random(OUT, seed=9).float(), f"{norm}.scale": random(16, seed=6).float(), f"{single}.scale": random(16, seed=5).float(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "lora.safetensors")
    theirs = in_comfyui(comfyui, tmp_path, tmp_path / "lora.safetensors")
    assert theirs["diffusion_model.img_in.weight"].shape == (OUT, 128)
    with open_lora(tmp_path / "lora.safetensors") as file:
        assert (file.family.name, file.unmatched) == ("Flux.1", ())
        convert(file, tmp_path / "written.safetensors", "comfyui")
    ours = in_comfyui(comfyui, tmp_path, tmp_path / "written.safetensors")
    for name, value in load_file(model).items():
        assert torch.equal(ours[name], theirs[name])
        assert not torch.equal(ours[name], value)
