"""Quantised files that ComfyUI's own layouts make: mergetool reads the weights that ComfyUI itself decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F32
from tests.families import checkpoint
from tests.oracles import ComfyUI
from tests.oracles.comparing import decoded, misloaded

FP8, E5M2, NVFP4, MXFP8, INT8, W4A4 = (
    "float8_e4m3fn",
    "float8_e5m2",
    "nvfp4",
    "mxfp8",
    "int8_tensorwise",
    "convrot_w4a4",
)
LARGEST: dict[str, Any] = {"scale": "recalculate"}
HALVES = ("bfloat16", "float16")


def rotated(group: int) -> dict[str, Any]:
    return {"how": {"per_channel": True, "convrot": True, "convrot_groupsize": group}}


MADE: dict[str, dict[str, Any]] = {
    "fp8": {"kind": FP8, "how": LARGEST},
    "fp8, scale 1": {"kind": FP8},
    "fp8, a given scale": {"kind": FP8, "how": {"scale": 0.004}},
    "fp8, stochastic": {"kind": FP8, "how": {**LARGEST, "stochastic_rounding": 7}},
    "fp8, scaled inputs": {"kind": FP8, "how": LARGEST, "beside": {"input_scale": 0.5}},
    "fp8, full precision": {"kind": FP8, "how": LARGEST, "said": {"full_precision_matrix_mult": True}},
    "fp8, in the header": {"kind": FP8, "how": LARGEST, "in_header": True},
    "e5m2": {"kind": E5M2, "how": LARGEST},
    "e5m2, scale 1": {"kind": E5M2},
    "e5m2, stochastic": {"kind": E5M2, "how": {**LARGEST, "stochastic_rounding": 7}},
    "nvfp4": {"kind": NVFP4},
    "nvfp4, a given scale": {"kind": NVFP4, "how": {"scale": 0.001}},
    "nvfp4, stochastic": {"kind": NVFP4, "how": {"stochastic_rounding": 7}},
    "nvfp4, scaled inputs": {"kind": NVFP4, "beside": {"input_scale": 0.5}},
    "nvfp4, smoothed": {"kind": NVFP4, "beside": {"pre_quant_scale": 1.5}},
    "nvfp4, in the header": {"kind": NVFP4, "in_header": True},
    "mxfp8": {"kind": MXFP8},
    "mxfp8, stochastic": {"kind": MXFP8, "how": {"stochastic_rounding": 7}},
    "mxfp8, in the header": {"kind": MXFP8, "in_header": True},
    "int8": {"kind": INT8, "how": LARGEST},
    "int8, by rows": {"kind": INT8, "how": {"per_channel": True}},
    "int8, stochastic": {"kind": INT8, "how": {"per_channel": True, "stochastic_rounding": 7}},
    "int8, in the header": {"kind": INT8, "how": {"per_channel": True}, "in_header": True},
    "int8, rotated by 4": {"kind": INT8, **rotated(4), "said": {"convrot": True, "convrot_groupsize": 4}},
    "int8, rotated by 16": {"kind": INT8, **rotated(16), "said": {"convrot": True, "convrot_groupsize": 16}},
    "int8, rotated by 64": {"kind": INT8, **rotated(64), "said": {"params": {"convrot": True, "convrot_groupsize": 64}}},
    "int4, rotated by 16": {"kind": W4A4, "how": {"convrot_groupsize": 16}, "said": {"convrot_groupsize": 16}},
    "int4, rotated by 64": {"kind": W4A4, "how": {"convrot_groupsize": 64}, "said": {"params": {"convrot_groupsize": 64}, "linear_dtype": "int8"}},
    **{f"{name} of {dtype}": {**made, "dtype": dtype} for dtype in HALVES for name, made in {
        "fp8": {"kind": FP8, "how": LARGEST}, "e5m2": {"kind": E5M2, "how": LARGEST}, "nvfp4": {"kind": NVFP4},
        "mxfp8": {"kind": MXFP8}, "int8": {"kind": INT8, "how": {"per_channel": True}}}.items()},
}  # fmt: skip
"""What ComfyUI's layouts are asked for; see the command ``quantise``."""


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("plain") / "plain.safetensors", dtype=F32)


def rounding(made: dict[str, Any], path: Path, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """Nothing, but for rotations: ComfyUI scales first and adds numbers that are rounded already, ``group`` of them."""
    group = made.get("how", {}).get("convrot_groupsize", 0)
    return {name: group * 2**-24 * np.abs(value).max() for name, value in expected.items()}


@pytest.mark.parametrize("made", MADE)
def test_mergetool_reads_what_comfyui_reads(tmp_path: Path, plain: Path, comfyui: ComfyUI, made: str) -> None:
    path = tmp_path / "made.safetensors"
    assert len(comfyui.ask("quantise", model=plain, out=path, **MADE[made])["quantised"]) > 10
    expected = decoded(path, tmp_path)
    assert misloaded(comfyui, path, expected, rounding(MADE[made], path, expected)) == []


@pytest.mark.parametrize(
    "made", ["fp8", "e5m2", "nvfp4", "mxfp8", "int8, by rows", "int8, rotated by 16", "int4, rotated by 64"]
)
def test_mergetool_reads_what_comfyui_saves_of_a_quantised_model(
    tmp_path: Path, plain: Path, comfyui: ComfyUI, made: str
) -> None:
    path, saved = tmp_path / "made.safetensors", tmp_path / "saved.safetensors"
    comfyui.ask("quantise", model=plain, out=path, **MADE[made])
    comfyui.ask("save", model=path, out=saved)
    assert {name: value.tolist() for name, value in decoded(saved, tmp_path).items()} == {
        name: value.tolist() for name, value in decoded(path, tmp_path).items()
    }


@pytest.mark.parametrize("marker", [torch.zeros(0, dtype=torch.float8_e4m3fn), torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(1)], ids=["empty", "two", "float32"])  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_mergetool_reads_old_scaled_fp8_as_comfyui_does(
    tmp_path: Path, plain: Path, comfyui: ComfyUI, marker: torch.Tensor, prefix: str
) -> None:
    stored = {"scaled_fp8": marker}
    for name, tensor in load_file(plain).items():
        if tensor.ndim == 2 and ("attention" in name or "feed_forward" in name):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
            stored[name.replace(".weight", ".scale_input")] = torch.ones(())
        else:
            stored[name] = tensor
    path = tmp_path / "old.safetensors"
    save_file({prefix + name: tensor for name, tensor in stored.items()}, path)
    assert misloaded(comfyui, path, decoded(path, tmp_path)) == []


def test_comfyui_takes_old_scaled_e5m2_for_e4m3_and_mergetool_reads_what_is_stored(
    tmp_path: Path, plain: Path, comfyui: ComfyUI
) -> None:
    """ComfyUI 0.30.0 converts the codes to e4m3, which ends at 448 where they go on to 57344."""
    name = "layers.0.attention.out.weight"
    stored = load_file(plain)
    scale = stored[name].abs().max() / 57344
    stored[name] = (stored[name] / scale).to(torch.float8_e5m2)
    values = (stored[name].float() * scale).double().numpy()
    stored |= {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e5m2), name.replace(".weight", ".scale_weight"): scale}
    path = tmp_path / "old.safetensors"
    save_file(stored, path)
    expected = decoded(path, tmp_path)
    np.testing.assert_array_equal(expected[name], values)
    (report,) = misloaded(comfyui, path, expected)
    assert report.startswith(f"{name} differs")
