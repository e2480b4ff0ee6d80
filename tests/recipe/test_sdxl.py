"""Merges of SDXL: what is quantised at the published size, all-in-one files, groups and blocks."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.checkpoint.dtypes import BY_CODE
from mergetool.checkpoint.header import Header
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from mergetool.recipe.plan import Plan
from tests.sdxl import PUBLISHED, SMALL, UNET, checkpoint, encoders, shapes, values

MERGE = "'a.safetensors' + 0.5*('b.safetensors' - 'a.safetensors')"


def planned(expression: str, **options: Any) -> Plan:
    with job.open_merge(expression, MergeOptions(**options), fingerprints=False) as plan:
        return plan


# -- the published size ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of SDXL's whole size, of which the disk holds the header alone."""
    path = tmp_path_factory.mktemp("published") / "sdxl.safetensors"
    header = Header.plan((UNET + name, BY_CODE["F16"], shape) for name, shape in shapes(PUBLISHED, "comfyui").items())
    with path.open("wb") as file:
        file.write(header.encode())
        file.truncate(len(header.encode()) + header.data_size)
    return path


@pytest.mark.parametrize(("quant", "bits"), [("fp8-scaled", 8), ("int8", 8), ("nvfp4", 4.5)])
def test_quantised_are_the_matrices_of_attentions_but_the_one_that_shows_the_context(
    published: Path, quant: str, bits: float
) -> None:
    plan = planned(f"'{published}'", quant=quant)
    matrices = {
        SDXL_UNET.stored_name(name, "comfyui"): prod(shape)
        for name, shape in shapes(PUBLISHED).items()
        if len(shape) == 2 and ".attentions." in name
    }
    del matrices["input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"]
    assert {tensor.name.removeprefix(UNET) for tensor in plan.tensors if tensor.quantiser} == matrices.keys()
    assert len(matrices) == 70 * 10 + 2 * 11 - 1
    kept = 2_567_463_684 - sum(matrices.values())
    assert plan.header.data_size == pytest.approx(sum(matrices.values()) * bits / 8 + 2 * kept, rel=3e-3)  # scales


# -- all-in-one files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def all_in_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """``a`` and ``b``, each with its encoders and VAE, in fp16; their tensors by file and stored name."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        path = tmp_path / f"{name}.safetensors"
        checkpoint(path, values(seed, dtype=torch.float16), prefix=UNET, beside=encoders(seed))
    return {name: load_file(f"{name}.safetensors") for name in "ab"}


def made(expression: str, **options: Any) -> dict[str, torch.Tensor]:
    mergetool.merge(expression, "out.safetensors", force=True, overwrite=True, **options)
    return load_file("out.safetensors")


def average(tensors: dict[str, dict[str, torch.Tensor]], name: str) -> np.ndarray:
    a, b = (tensors[model][name].double().numpy() for model in "ab")
    rounded: np.ndarray = (a + 0.5 * (b - a)).astype(np.float16)
    return rounded


@pytest.mark.parametrize("bundled", ["keep", "merge"])
def test_two_all_in_one_files_are_merged(all_in_one: dict[str, dict[str, torch.Tensor]], bundled: str) -> None:
    found = made(MERGE, bundled=bundled)
    assert found.keys() == all_in_one["a"].keys()
    beside = encoders(0).keys()
    for name in found:
        if name in beside and (bundled == "keep" or not found[name].is_floating_point()):
            assert found[name].equal(all_in_one["a"][name])
        else:
            np.testing.assert_allclose(found[name].numpy(), average(all_in_one, name), rtol=2**-10, atol=2**-24)


def test_the_encoders_stay_as_they_are_where_the_unet_is_quantised(
    all_in_one: dict[str, dict[str, torch.Tensor]],
) -> None:
    found = made("'a.safetensors'", quant="fp8-scaled")
    assert found[f"{UNET}middle_block.1.proj_in.weight"].dtype is torch.float8_e4m3fn
    assert all(found[name].equal(all_in_one["a"][name]) for name in encoders(0))


# -- groups and blocks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """``a`` and ``b``, whose values and differences float32 holds exactly, in two layouts; their tensors by file and name in diffusers."""
    monkeypatch.chdir(tmp_path)
    tensors = {
        name: {part: (tensor * 400).round() / 16 for part, tensor in values(seed).items()}
        for seed, name in enumerate("ab")
    }
    checkpoint(tmp_path / "a.safetensors", tensors["a"], prefix=UNET)
    checkpoint(tmp_path / "b.safetensors", tensors["b"], layout="diffusers")
    return tensors


def shares(models: dict[str, dict[str, torch.Tensor]], *settings: str) -> dict[str, float]:
    """How much of the way from ``a`` to ``b`` every part has gone, by its name in ComfyUI."""
    found = made("'a.safetensors' + ('b.safetensors' - 'a.safetensors')", multipliers=list(settings))
    gone = {}
    for part, a in models["a"].items():
        name = SDXL_UNET.stored_name(part, "comfyui")
        delta, done = (models["b"][part] - a).double(), (found[UNET + name] - a).double()
        gone[name] = float((delta * done).sum() / (delta * delta).sum())
        assert done.equal(delta * gone[name])
    return gone


def test_groups_have_multipliers_of_their_own(models: dict[str, dict[str, torch.Tensor]]) -> None:
    found = shares(models, "*=0", "attn2=1", "middle_block.ffn=0.5", "embedder=0.25")
    for name, share in found.items():
        middle = name.startswith("middle_block.")
        expected = (
            1
            if ".attn2." in name
            else 0.5
            if middle and ".ff." in name
            else 0.25
            if "_emb" in name.split(".")[0]
            else 0
        )
        assert share == expected, name


def test_a_gradient_weighs_blocks_as_they_are_numbered(models: dict[str, dict[str, torch.Tensor]]) -> None:
    found = shares(models, "*=0", "input_blocks=linear(0,1)", "output_blocks=linear(1,0)", "middle_block=0.5")
    blocks = {"input_blocks": (0, 1 / 8), "middle_block": (0.5, 0), "output_blocks": (1, -1 / 8)}
    for name, share in found.items():
        stack, number, *_ = name.split(".")
        first, step = blocks.get(stack, (0, 0))
        assert share == (first + step * int(number) if stack in blocks else 0), name


def test_an_inpainting_model_takes_a_difference_beside_its_first_layer(
    models: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    inpaint = values(2, {**SMALL, "in_channels": 9})
    checkpoint(tmp_path / "inpaint.safetensors", inpaint, prefix=UNET)
    added = "'inpaint.safetensors' + ('b.safetensors' - 'a.safetensors')"
    found = made(added, exclude=["conv_in.weight"])
    assert found[f"{UNET}input_blocks.0.0.weight"].equal(inpaint["conv_in.weight"])
    part = "mid_block.resnets.0.conv1.weight"
    expected = inpaint[part].double() + models["b"][part].double() - models["a"][part].double()
    torch.testing.assert_close(
        found[f"{UNET}middle_block.0.in_layers.2.weight"].double(), expected, rtol=2**-22, atol=0
    )
