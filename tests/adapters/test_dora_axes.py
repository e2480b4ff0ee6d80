"""A DoRA's magnitudes keep their axis in every format that is written, or the format refuses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.adapters.convert import convert
from mergetool.adapters.formats import KeyFormat
from mergetool.adapters.lora_file import open_lora
from mergetool.errors import DataError
from tests.adapters.spellings import BLOCK, DIM, FFN, f64, random
from tests.adapters.test_traps import moved

SQUARE, WIDE = f"{BLOCK}.attention.to_out.0", f"{BLOCK}.feed_forward.w1"
SHAPES = {SQUARE: (DIM, DIM), WIDE: (FFN, DIM)}
AXES = {
    "[out]": ("lora_magnitude_vector", 0),
    "[out, 1]": ("dora_scale", 1),
    "[1, in]": ("dora_scale", 2),
    "[out] in kohya's name": ("dora_scale", 0),
}


def written(folder: Path, axis: str) -> tuple[Path, dict[str, np.ndarray]]:
    """A DoRA of two modules, and what it changes by training's formula in float64, of the model that `moved` bakes it into."""
    name, dimensions = AXES[axis]
    tensors = {}
    for i, (module, (rows, columns)) in enumerate(SHAPES.items()):
        key = f"transformer.{module}"
        tensors[f"{key}.lora_A.weight"] = random(2, columns, seed=10 * i)
        tensors[f"{key}.lora_B.weight"] = random(rows, 2, seed=10 * i + 1)
        by_columns = dimensions == 2
        scale = random(columns if by_columns else rows, seed=10 * i + 2).abs() + 0.5
        tensors[f"{key}.{name}"] = scale[None] if by_columns else scale[:, None] if dimensions else scale
    save_file(tensors, folder / "dora.safetensors")
    return folder / "dora.safetensors", moved(folder, folder / "dora.safetensors")


@pytest.mark.parametrize("key_format", ["default", "comfyui", "kohya", "peft"])
@pytest.mark.parametrize("axis", AXES)
def test_a_converted_dora_changes_a_model_as_before_or_is_refused(
    tmp_path: Path, axis: str, key_format: KeyFormat
) -> None:
    lora, changes = written(tmp_path, axis)
    output = tmp_path / ("out" if key_format == "peft" else "converted.safetensors")
    with open_lora(lora) as file:
        if (key_format, axis) == ("peft", "[1, in]"):
            with pytest.raises(DataError, match=r"magnitudes of its inputs, where PEFT has those of outputs only"):
                convert(file, output, key_format)
            return
        convert(file, output, key_format)
    found = moved(tmp_path, output)
    assert all(np.array_equal(found[part], change) for part, change in changes.items())
    assert all(np.abs(found[f"{module}.weight"]).max() > 0.1 for module in SHAPES)


@pytest.mark.parametrize("key_format", ["default", "comfyui", "kohya"])
@pytest.mark.parametrize("axis", AXES)
def test_comfyui_gets_magnitudes_of_two_dimensions(tmp_path: Path, axis: str, key_format: KeyFormat) -> None:
    """ComfyUI divides them by norms [out, 1] or [1, in]: a vector would become a matrix (comfy/weight_adapter/base.py)."""
    lora, _ = written(tmp_path, axis)
    with open_lora(lora) as file:
        convert(file, tmp_path / "converted.safetensors", key_format)
    tensors = load_file(tmp_path / "converted.safetensors")
    shapes = sorted(tuple(held.shape) for key, held in tensors.items() if key.endswith(".dora_scale"))
    assert shapes == ([(1, DIM)] * 2 if axis == "[1, in]" else [(DIM, 1), (FFN, 1)])


def test_magnitudes_of_another_number_are_refused(tmp_path: Path) -> None:
    lora, _ = written(tmp_path, "[out]")
    tensors = load_file(lora)
    tensors[f"transformer.{WIDE}.lora_magnitude_vector"] = torch.ones(DIM)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with (
        open_lora(tmp_path / "damaged.safetensors") as file,
        pytest.raises(DataError, match=r"64 magnitudes, where 170"),
    ):
        convert(file, tmp_path / "c.safetensors", "default")


def test_fp8_factors_of_q_k_and_v_become_one(tmp_path: Path) -> None:
    tensors = {}
    for i, letter in enumerate("qkv"):
        name = f"diffusion_model.{BLOCK}.attention.to_{letter}"
        tensors[f"{name}.lora_A.weight"] = random(2, DIM, seed=1).to(torch.float8_e4m3fn)
        tensors[f"{name}.lora_B.weight"] = random(DIM, 2, seed=i + 2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "lora.safetensors")
    with open_lora(tmp_path / "lora.safetensors") as file:
        convert(file, tmp_path / "out.safetensors", "comfyui")
    out = load_file(tmp_path / "out.safetensors")
    name = f"diffusion_model.{BLOCK}.attention.qkv"
    ups = torch.cat(
        [tensors[f"diffusion_model.{BLOCK}.attention.to_{letter}.lora_B.weight"].float() for letter in "qkv"]
    )
    assert torch.equal(out[f"{name}.lora_up.weight"].float(), ups)
    assert out[f"{name}.lora_down.weight"].dtype is torch.float8_e4m3fn
    assert np.array_equal(
        f64(out[f"{name}.lora_down.weight"].float()), f64(random(2, DIM, seed=1).to(torch.float8_e4m3fn).float())
    )
