"""LoRAs added by the real ComfyUI and by ``mergetool lora bake``: the same weights, but for float32's roundings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.arch.families.z_image import reference_shapes
from mergetool.checkpoint.dtypes import F32
from tests.adapters.spellings import (
    BLOCK,
    DIM,
    DOWN,
    FFN,
    UP,
    A,
    B,
    Written,
    differences,
    embedders,
    fused,
    loha,
    lokr,
    musubi_for_comfy,
    random,
    split,
)
from tests.families import TINY, checkpoint
from tests.oracles import ComfyUI
from tests.oracles.comparing import Values, mispatched, read, run, unlike

UNIT = 2.0**-24
"""Half a step of float32 at 1: what one rounding adds at most, relative to the number that is rounded."""
TERMS = 16
"""More products than any element of these LoRAs is a sum of, with the scale and the addition to the weight."""

KINDS: dict[str, Callable[[], Written]] = {
    "LoRA": lambda: split("diffusion_model.", A, B),
    "LoRA with alphas": lambda: split("diffusion_model.", DOWN, UP, alpha=8),
    "LoRA of fused names": lambda: fused("lora_unet_", DOWN, UP, alpha=8, flat=True),
    "LoRA of three in one": musubi_for_comfy,
    "LoRA of embedders": embedders,
    "LoHa": lambda: loha("diffusion_model."),
    "LoKr": lambda: lokr("diffusion_model."),
    "LoKr, decomposed": lambda: lokr("lycoris_", flat=True, decomposed=True, alpha=1.0),
    "whole differences": differences,
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32."""
    return checkpoint(tmp_path_factory.mktemp("base") / "base.safetensors", dtype=F32)


@pytest.fixture(scope="session")
def zeros(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with every value 0."""
    path = tmp_path_factory.mktemp("zeros") / "zeros.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in reference_shapes(TINY, "comfyui").items()}, path)
    return path


def baked(base: Path, lora: Path, strength: float = 1) -> Values:
    out = lora.with_name("baked.safetensors")
    run(
        "lora",
        "bake",
        base,
        f"{lora}:{strength}",
        "-o",
        out,
        "--dtype",
        "fp32",
        "--force",
        "--overwrite",
        folder=lora.parent,
    )
    return read(out)


def allowed(comfyui: ComfyUI, base: Path, zeros: Path, lora: Path, strength: float) -> Values:
    """How far two float32 results may lie apart: TERMS roundings each, of numbers no larger than the sum of all magnitudes."""
    magnitudes = lora.with_name("magnitudes.safetensors")
    save_file({name: tensor.abs() for name, tensor in load_file(lora).items()}, magnitudes)
    out = lora.with_name("summed.safetensors")
    comfyui.ask("patch", model=zeros, lora=magnitudes, out=out, strength=abs(strength))
    weights = read(base)
    return {name: 2 * TERMS * UNIT * (sums + np.abs(weights[name])) for name, sums in read(out).items()}


@pytest.mark.parametrize("strength", [1, 0.7, -2])
@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_adds_what_bake_adds(
    tmp_path: Path, base: Path, zeros: Path, comfyui: ComfyUI, kind: str, strength: float
) -> None:
    lora = KINDS[kind]().save(tmp_path)
    tolerance = allowed(comfyui, base, zeros, lora, strength)
    assert mispatched(comfyui, base, lora, baked(base, lora, strength), tolerance, strength=strength) == []


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_", "transformer.", "lycoris_", ""])
def test_every_name_that_comfyui_knows_means_the_same_rows(
    tmp_path: Path, base: Path, comfyui: ComfyUI, prefix: str
) -> None:
    starts = ("diffusion_model.", "lora_unet_", "transformer.", "lycoris_")
    names = {
        name: target
        for name, target in comfyui.ask("names", model=base)["names"].items()
        if (name.startswith(prefix) if prefix else not name.startswith(starts)) and "pad_token" not in name
    }
    weights = load_file(base)
    for tensors in without_overlaps(names, weights):
        lora = Written(tensors).save(tmp_path)
        assert mispatched(comfyui, base, lora, baked(base, lora)) == []


def without_overlaps(names: dict[str, list[Any]], weights: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Whole differences under all names, in as many files as it takes for no row to be changed twice."""
    files: list[dict[str, torch.Tensor]] = []
    taken: list[set[tuple[str, int]]] = []
    for i, (name, (target, start, length)) in enumerate(names.items()):
        stored = target.removeprefix("diffusion_model.")
        if stored not in weights:  # a modulation of the context refiners, which they have not
            continue
        first, count = start or 0, length or weights[stored].shape[0]
        rows = {(stored, row) for row in range(first, first + count)}
        place = next((j for j, held in enumerate(taken) if not held & rows), len(files))
        if place == len(files):
            files.append({})
            taken.append(set())
        files[place][f"{name}.diff"] = random(count, *weights[stored].shape[1:], seed=i)
        taken[place] |= rows
    return files


@pytest.mark.parametrize("key_format", ["default", "diffusers", "comfyui"])
def test_comfyui_adds_what_convert_writes(
    tmp_path: Path, base: Path, zeros: Path, comfyui: ComfyUI, key_format: str
) -> None:
    lora = split("diffusion_model.", DOWN, UP, alpha=8).save(tmp_path)
    converted = tmp_path / "converted" / "lora.safetensors"
    converted.parent.mkdir()
    run("lora", "convert", lora, "-o", converted, "--key-format", key_format, folder=tmp_path)
    tolerance = allowed(comfyui, base, zeros, lora, 1)
    assert (
        mispatched(comfyui, base, converted, baked(base, converted), allowed(comfyui, base, zeros, converted, 1)) == []
    )
    rounded = {
        name: bound + 2**-7 * np.abs(bound / (2 * TERMS * UNIT)) for name, bound in tolerance.items()
    }  # bf16 factors
    assert mispatched(comfyui, base, converted, baked(base, lora), rounded) == []


def test_comfyui_adds_what_diff_writes(tmp_path: Path, base: Path, zeros: Path, comfyui: ComfyUI) -> None:
    variant = checkpoint(tmp_path / "variant.safetensors", variant=1, dtype=F32)
    lora, full = tmp_path / "lora.safetensors", tmp_path / "full.safetensors"
    run("diff", "--base", base, "--variant", variant, "-o", lora, "--full", full, "--min-dim", 1, folder=tmp_path)
    for file in (lora, full):
        assert mispatched(comfyui, base, file, baked(base, file), allowed(comfyui, base, zeros, file, 1)) == []


# -- DoRA: the change depends on the weight ------------------------------------------------------------------------------------


def dora(module: str, rows: int, scale: torch.Tensor) -> Written:
    name = f"diffusion_model.{module}"
    down, up = random(4, DIM, seed=1), random(rows, 4, seed=2)
    return Written(
        {f"{name}{DOWN}": down, f"{name}{UP}": up, f"{name}.dora_scale": scale, f"{name}.alpha": torch.tensor(2.0)}
    )


def moved(weight: np.ndarray, written: Written) -> np.ndarray:
    factors = {
        end: tensor.double().numpy()
        for name, tensor in written.tensors.items()
        for end in (UP, DOWN)
        if name.endswith(end)
    }
    product: np.ndarray = weight + factors[UP] @ factors[DOWN] * 2 / 4
    return product


def near(values: np.ndarray) -> np.ndarray:
    """DoRA's roundings: a norm of n squares (n halves, for the root), the sums that are normalised, the magnitude and the change."""
    return np.full_like(values, (max(values.shape) / 2 + 2 * TERMS) * UNIT * 4 * np.abs(values).max())


@pytest.mark.parametrize("strength", [1, 0.7, -2])
@pytest.mark.parametrize(("module", "stored", "rows"), [(f"{BLOCK}.feed_forward.w1", f"{BLOCK}.feed_forward.w1", FFN),
    (f"{BLOCK}.attention.qkv", f"{BLOCK}.attention.qkv", 3 * DIM)], ids=["alone", "fused"])  # fmt: skip
def test_comfyui_adds_the_dora_of_inputs_that_bake_adds(
    tmp_path: Path, base: Path, comfyui: ComfyUI, module: str, stored: str, rows: int, strength: float
) -> None:
    lora = dora(module, rows, random(1, DIM, seed=3).abs() + 1).save(tmp_path)
    expected = baked(base, lora, strength)
    changed = f"{stored}.weight"
    tolerance = {name: near(value) if name == changed else np.zeros_like(value) for name, value in expected.items()}
    assert mispatched(comfyui, base, lora, expected, tolerance, strength=strength) == []
    assert np.abs(expected[changed] - read(base)[changed]).max() > 0.2


@pytest.mark.parametrize("strength", [1, 0.7])
def test_comfyui_divides_the_dora_of_outputs_by_the_weights_own_norm(
    tmp_path: Path, base: Path, comfyui: ComfyUI, strength: float
) -> None:
    """Where training divides by the norm of the sum, as bake does."""
    scale = random(FFN, 1, seed=3).abs() + 1
    written, name = dora(f"{BLOCK}.feed_forward.w1", FFN, scale), f"{BLOCK}.feed_forward.w1.weight"
    before = read(base)
    weight = before[name]
    norms = np.linalg.norm(weight, axis=1, keepdims=True)
    theirs = weight + strength * (scale.double().numpy() * moved(weight, written) / norms - weight)
    expected = {**before, name: theirs}
    tolerance = {name: near(value) for name, value in expected.items()}
    assert mispatched(comfyui, base, written.save(tmp_path), expected, tolerance, strength=strength) == []
    ours = weight + strength * (
        scale.double().numpy() * moved(weight, written) / np.linalg.norm(moved(weight, written), axis=1, keepdims=True)
        - weight
    )
    lora = tmp_path / "lora.safetensors"
    assert unlike(baked(base, lora, strength), {**before, name: ours}, tolerance) == []


# -- convolutions, which Z-Image has none of: ComfyUI's adapters on tensors ----------------------------------------------------

CONV = {"blocks.0.conv.weight": (8, 4, 3, 3), "blocks.0.skip.weight": (8, 4, 1, 1), "blocks.0.time.weight": (8, 4)}


def convolution(**factors: tuple[int, ...]) -> Callable[[], dict[str, torch.Tensor]]:
    """A LoRA of the 3x3 convolution with these factors, and an alpha of 3."""

    def made() -> dict[str, torch.Tensor]:
        tensors = {
            f"blocks.0.conv.{role.replace('__', '.')}": random(*shape, seed=i).float()
            for i, (role, shape) in enumerate(factors.items())
        }
        return {**tensors, "blocks.0.conv.alpha": torch.tensor(3.0)}

    return made


CONVOLUTIONS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "LoCon": convolution(lora_down__weight=(2, 4, 3, 3), lora_up__weight=(8, 2, 1, 1)),
    "LoCon with a middle": convolution(lora_down__weight=(2, 4, 1, 1), lora_up__weight=(8, 2, 1, 1), lora_mid__weight=(2, 2, 3, 3)),
    "LoHa": convolution(hada_w1_a=(8, 2), hada_w1_b=(2, 36), hada_w2_a=(8, 2), hada_w2_b=(2, 36)),
    "LoHa with cores": convolution(hada_t1=(2, 2, 3, 3), hada_w1_a=(2, 8), hada_w1_b=(2, 4), hada_t2=(2, 2, 3, 3), hada_w2_a=(2, 8), hada_w2_b=(2, 4)),
    "LoKr": convolution(lokr_w1=(2, 2), lokr_w2=(4, 2, 3, 3)),
    "a whole difference": convolution(diff=(8, 4, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("strength", [1, 0.7, -2])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_comfyui_adds_to_convolutions_what_bake_adds(
    tmp_path: Path, comfyui: ComfyUI, kind: str, strength: float
) -> None:
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file({name: random(*shape, seed=20 + i).float() for i, (name, shape) in enumerate(CONV.items())}, base)
    factors = CONVOLUTIONS[kind]()
    save_file(factors, lora)
    answer = comfyui.ask("add", weights=base, lora=lora, out=tmp_path / "added.safetensors", strength=strength)
    assert (answer["log"], answer["patched"]) == ([], ["blocks.0.conv.weight"])
    # every sum is of 2 products a factor, of numbers no larger than the largest
    largest = max(float(tensor.abs().max()) for tensor in factors.values())
    bound = 2 * TERMS * UNIT * (abs(strength) * 16 * max(1, largest) ** 6 * 3 + 1)
    assert (
        unlike(read(tmp_path / "added.safetensors"), baked(base, lora, strength), dict.fromkeys(CONV, np.array(bound)))
        == []
    )


def test_comfyui_skips_a_lokr_with_a_core_and_says_so(tmp_path: Path, comfyui: ComfyUI) -> None:
    """``torch.kron`` does not take what its sum over the core gives, so the tensor stays as it was."""
    base, lora = tmp_path / "base.safetensors", tmp_path / "lora.safetensors"
    save_file({"blocks.0.conv.weight": random(8, 4, 3, 3, seed=1).float()}, base)
    save_file(convolution(lokr_w1=(2, 2), lokr_t2=(2, 2, 3, 3), lokr_w2_a=(2, 4), lokr_w2_b=(2, 2))(), lora)
    answer = comfyui.ask("add", weights=base, lora=lora, out=tmp_path / "added.safetensors")
    assert answer["log"][0].startswith("ERROR lokr blocks.0.conv.weight")
    assert unlike(read(tmp_path / "added.safetensors"), read(base)) == []
