"""Each fault that the comparisons with ComfyUI are for is made on purpose, and reported by the comparison that the real tests use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F32
from tests.adapters.spellings import BLOCK, DIM, DOWN, UP, A, B, Written, random, split
from tests.families import checkpoint
from tests.oracles import ComfyUI
from tests.oracles.comparing import decoded, misloaded, mispatched, read, run

Tensors = dict[str, torch.Tensor]
LAYER = f"{BLOCK}.attention.qkv"
UNLIKE = f"{LAYER}.weight differs"


def a_wrong_scale(stored: Tensors) -> None:
    stored[f"{LAYER}.weight_scale"] = stored[f"{LAYER}.weight_scale"] * 1.01


def anothers_scale(stored: Tensors) -> None:
    stored[f"{LAYER}.weight_scale"] = stored[f"{BLOCK}.attention.out.weight_scale"].clone()


def q_and_k_swapped(stored: Tensors) -> None:
    rows = stored[f"{LAYER}.weight"]
    stored[f"{LAYER}.weight"] = rows.view(torch.uint8).roll(DIM, dims=0).view(rows.dtype)


def a_key_renamed(stored: Tensors) -> None:
    stored[f"{BLOCK}.attention_norm_1.weight"] = stored.pop(f"{BLOCK}.attention_norm1.weight")


def a_key_dropped(stored: Tensors) -> None:
    del stored[f"{BLOCK}.attention_norm1.weight"]


def no_marker(stored: Tensors) -> None:
    del stored[f"{LAYER}.comfy_quant"]


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (a_wrong_scale, UNLIKE),
        (anothers_scale, UNLIKE),
        (q_and_k_swapped, UNLIKE),
        (a_key_renamed, f"{BLOCK}.attention_norm1.weight is missing"),
        (a_key_renamed, f"{BLOCK}.attention_norm_1.weight is unexpected"),
        (a_key_dropped, f"{BLOCK}.attention_norm1.weight is missing"),
        (no_marker, f"{LAYER}.weight_scale is unexpected"),
    ],
)
def test_a_fault_in_a_model_is_reported(
    tmp_path: Path, comfyui: ComfyUI, fault: Callable[[Tensors], None], report: str
) -> None:
    source = checkpoint(tmp_path / "source.safetensors", dtype=F32)
    run("convert", source, "-o", "good.safetensors", "--quant", "fp8-scaled", folder=tmp_path)
    stored = load_file(tmp_path / "good.safetensors")
    fault(stored)
    save_file(stored, tmp_path / "faulty.safetensors")
    found = misloaded(comfyui, tmp_path / "faulty.safetensors", decoded(tmp_path / "good.safetensors", tmp_path))
    assert any(sentence.startswith(report) for sentence in found), found


TO_Q, TO_K = (f"diffusion_model.{BLOCK}.attention.to_{letter}" for letter in "qk")


def a_wrong_alpha(tensors: Tensors) -> None:
    tensors[f"{TO_Q}.alpha"] *= 1.01


def swapped(tensors: Tensors) -> None:
    for end in (DOWN, UP, ".alpha"):
        tensors[TO_Q + end], tensors[TO_K + end] = tensors[TO_K + end], tensors[TO_Q + end]


def a_renamed_module(tensors: Tensors) -> None:
    for end in (DOWN, UP, ".alpha"):
        tensors[TO_Q.replace("to_q", "q") + end] = tensors.pop(TO_Q + end)


def a_changed_factor(tensors: Tensors) -> None:
    tensors[TO_Q + DOWN] = tensors[TO_Q + DOWN] * 1.01


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        (a_wrong_alpha, UNLIKE),
        (swapped, UNLIKE),
        (a_renamed_module, UNLIKE),
        (a_renamed_module, "lora key not loaded"),
        (a_changed_factor, UNLIKE),
    ],
)
def test_a_fault_in_a_lora_is_reported(
    tmp_path: Path, comfyui: ComfyUI, fault: Callable[[Tensors], None], report: str
) -> None:
    base = checkpoint(tmp_path / "base.safetensors", dtype=F32)
    written = split("diffusion_model.", DOWN, UP, alpha=8)
    run("lora", "bake", base, written.save(tmp_path), "-o", "baked.safetensors", folder=tmp_path)
    fault(written.tensors)
    expected = read(tmp_path / "baked.safetensors")
    allowed = {name: abs(value).max() * 2**-18 for name, value in expected.items()}
    found = mispatched(comfyui, base, written.save(tmp_path), expected, allowed)
    assert any(sentence.startswith(report) for sentence in found), found


def test_magnitudes_of_one_dimension_are_reported(tmp_path: Path, comfyui: ComfyUI) -> None:
    """A vector means what a column means to mergetool; ComfyUI multiplies along the wrong axis, or not at all."""
    base = checkpoint(tmp_path / "base.safetensors", dtype=F32)
    name = f"diffusion_model.{BLOCK}.feed_forward.w2"
    tensors = {name + A: random(4, 170, seed=1), name + B: random(DIM, 4, seed=2)}
    run("lora", "bake", base, Written(tensors).save(tmp_path), "-o", "baked.safetensors", folder=tmp_path)
    tensors[f"{name}.dora_scale"] = random(DIM, seed=3).abs() + 1
    found = mispatched(comfyui, base, Written(tensors).save(tmp_path), read(tmp_path / "baked.safetensors"))
    assert any(
        sentence.startswith(f"ERROR lora diffusion_model.{BLOCK}.feed_forward.w2.weight") for sentence in found
    ), found
