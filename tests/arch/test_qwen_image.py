"""Qwen-Image's names and shapes against diffusers' model, its variants, and the marker of Edit 2511."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageControlNetModel, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file

from mergetool.arch import Anatomy, recognise
from mergetool.arch.families.qwen_image import LAYERS, MARKER, PUBLISHED, QWEN_IMAGE
from mergetool.arch.generic import GENERIC
from tests.adapters.qwen_image import CASE, CONFIG
from tests.arch.tables import table
from tests.cli.run import mergetool

LAYERED = {**PUBLISHED, "kinds": 2}
Shapes = dict[str, tuple[int, ...]]


def of_class(**config: Any) -> Shapes:
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def anatomy(shapes: Shapes, prefix: str = "") -> Anatomy:
    return recognise(table(shapes, prefix=prefix), source="q")


@pytest.mark.parametrize(
    ("sizes", "config", "tensors", "parameters"),
    [
        (PUBLISHED, {}, 1933, 20_430_401_088),
        (LAYERED, {"use_additional_t_cond": True, "use_layer3d_rope": True}, 1934, 20_430_407_232),
    ],
    ids=["base", "Layered"],
)
@pytest.mark.parametrize("layout", QWEN_IMAGE.layouts)
def test_names_and_shapes_are_those_of_the_diffusers_model(
    sizes: dict[str, int], config: dict[str, Any], tensors: int, parameters: int, layout: str
) -> None:
    shapes = QWEN_IMAGE.shapes(sizes, layout)
    assert shapes == of_class(**config)
    found = anatomy(shapes)
    assert (len(shapes), sum(part.numel for part in found.parts.values())) == (tensors, parameters)
    made = QWEN_IMAGE.config(found)
    assert made is not None
    assert of_class(**{key: value for key, value in made.items() if key != "_class_name"}) == shapes


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
@pytest.mark.parametrize(
    ("more", "variant"),
    [({}, "base or Edit"), ({MARKER: (0,)}, "Edit 2511"), ({f"{LAYERS}.weight": (2, 256)}, "Layered")],
)
def test_variants_are_told_apart(more: Shapes, variant: str, prefix: str) -> None:
    found = anatomy(CASE.shapes("comfyui") | more, prefix)
    assert (found.family, found.prefix) == (QWEN_IMAGE, prefix)
    assert QWEN_IMAGE.variant(found) == variant
    assert all(QWEN_IMAGE.groups(name, part.shape) for name, part in found.parts.items())


def test_relatives_are_not_qwen_image() -> None:
    with torch.device("meta"):
        control = QwenImageControlNetModel(**CONFIG)
    shapes = {name: tuple(value.shape) for name, value in control.state_dict().items()}
    mage = CASE.shapes("comfyui") | {"txt_norm.weight": (2560,), "proj_out.weight": (128, 256)}
    assert anatomy(shapes).family is GENERIC
    assert anatomy(mage).family.name == "Mage-Flow"


@pytest.mark.parametrize(
    ("group", "parts", "parameters"),
    [
        ("modulation", 60 * 4 + 2, 60 * 2 * 6 * 3072 * 3073 + 2 * 3072 * 3073),
        ("q", 60 * 4, 60 * 2 * 3072 * 3073),
        ("attention", 60 * 20, 60 * (8 * 3072 * 3073 + 4 * 128)),
        ("ffn", 60 * 8, 60 * 2 * (12288 * 3073 + 3072 * 12289)),
        ("txt", 60 * 16 + 3, 60 * (6 * 3072 * 3073 + 4 * 3072 * 3073 + 2 * 128 + 12288 * 3073 + 3072 * 12289) + 3584 * 3073 + 3072),
    ],
)  # fmt: skip
def test_groups(group: str, parts: int, parameters: int) -> None:
    found = anatomy(QWEN_IMAGE.shapes(PUBLISHED, "comfyui"))
    members = [part for part in found.parts.values() if group in QWEN_IMAGE.groups(part.name, part.shape)]
    assert (len(members), sum(part.numel for part in members)) == (parts, parameters)


# -- the marker ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """``a`` and ``b`` of Edit 2511, ``b`` in a whole checkpoint."""
    for seed, (name, prefix) in enumerate((("a", ""), ("b", "model.diffusion_model."))):
        tensors = {**CASE.values(seed), MARKER: torch.zeros(0)}
        save_file({prefix + key: value for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    return tmp_path


def ran(folder: Path, *arguments: str) -> str:
    done = mergetool(*arguments, cwd=folder)
    assert done.code == 0, done.err
    return done.out


@pytest.mark.parametrize(
    "how",
    [
        ("merge", "'a.safetensors' + 0.5 * ('b.safetensors' - 'a.safetensors')"),
        ("merge", "slerp('a.safetensors', 'b.safetensors', t=0.5)", "--from", "a.safetensors"),
        ("convert", "a.safetensors", "--dtype", "bf16"),
        ("convert", "a.safetensors", "--quant", "fp8-scaled"),
        ("convert", "a.safetensors", "--layout", "diffusers"),
        ("convert", "b.safetensors", "--prefix", ""),
    ],
    ids=["sum", "method", "dtype", "quantised", "layout", "prefix"],
)
def test_the_marker_survives(models: Path, how: tuple[str, ...]) -> None:
    ran(models, *how, "-o", "out.safetensors")
    assert load_file(models / "out.safetensors")[MARKER].shape == (0,)
    assert "Edit 2511" in ran(models, "inspect", "out.safetensors")
    ran(models, "verify", "out.safetensors")


def test_commands_that_compare_take_files_with_the_marker(models: Path) -> None:
    ran(models, "diff", "a.safetensors", "b.safetensors", "-o", "lora.safetensors", "--rank", "4")
    ran(models, "compare", "a.safetensors", "b.safetensors")
    ran(models, "lora", "verify", "a.safetensors", "lora.safetensors", "b.safetensors")
    ran(models, "lora", "bake", "a.safetensors", "lora.safetensors", "-o", "c.safetensors")
    assert MARKER in load_file(models / "c.safetensors")


def test_what_diffusers_says_in_its_config_a_single_file_says_by_the_marker(tmp_path: Path) -> None:
    model = QwenImageTransformer2DModel(**CONFIG, zero_cond_t=True)
    model.save_pretrained(tmp_path / "folder")
    assert "Edit 2511" in ran(tmp_path, "inspect", "folder")
    ran(tmp_path, "convert", "folder", "-o", "out.safetensors", "--layout", "comfyui")
    tensors = load_file(tmp_path / "out.safetensors")
    assert tensors.keys() == {*model.state_dict(), MARKER}
    ran(tmp_path, "convert", "out.safetensors", "-o", "back/", "--layout", "diffusers")
    back = QwenImageTransformer2DModel.from_pretrained(tmp_path / "back")
    assert back.config["zero_cond_t"] is True
    assert all(torch.equal(value, tensors[name]) for name, value in back.state_dict().items())
