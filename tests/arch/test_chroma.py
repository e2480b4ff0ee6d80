"""Chroma's names and shapes against both programs' classes, its variants, and Radiance, which only ComfyUI has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import ChromaTransformer2DModel

from mergetool.arch import Anatomy, recognise
from mergetool.arch.families.chroma import APPROXIMATOR, CHROMA, HD, RADIANCE, SEQUENTIAL, X0
from mergetool.errors import FamilyError
from tests.arch.tables import table
from tests.oracles import ComfyUI
from tests.oracles.case import in_comfyui

pytestmark = pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
Shapes = dict[str, tuple[int, ...]]


def of_class(**config: Any) -> Shapes:
    with torch.device("meta"):
        model = ChromaTransformer2DModel(**config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def anatomy(shapes: Shapes, prefix: str = "") -> Anatomy:
    return recognise(table(shapes, prefix=prefix), source="c")


def test_names_and_shapes_are_those_of_the_diffusers_model() -> None:
    shapes = CHROMA.shapes(HD, "diffusers")
    assert shapes == of_class()
    config = CHROMA.config(anatomy(shapes))
    assert config is not None
    assert of_class(**{key: value for key, value in config.items() if key != "_class_name"}) == shapes


@pytest.mark.parametrize(("layout", "tensors"), [("comfyui", 643), ("diffusers", 1023)])
def test_published_sizes(layout: str, tensors: int) -> None:
    parts = anatomy(CHROMA.shapes(HD, layout)).parts
    assert len(CHROMA.shapes(HD, layout)) == tensors
    assert sum(part.numel for part in parts.values()) == 8_899_983_424


@pytest.mark.parametrize("head", ["conv", "linear"])
def test_radiance_has_the_tensors_of_comfyuis_class(comfyui: ComfyUI, head: str) -> None:
    sizes = dict(RADIANCE) if head == "conv" else {**RADIANCE, "nerf_linear": RADIANCE["nerf_conv"]}
    if head == "linear":
        del sizes["nerf_conv"]
    shapes = {in_comfyui(name): shape for name, shape in CHROMA.shapes(sizes, "comfyui").items()}
    config = {"in_channels": 3, "out_channels": 3, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19,
              "depth_single_blocks": 38, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 16, "qkv_bias": True, "in_dim": 64, "out_dim": 3072,
              "hidden_dim": 5120, "n_layers": 5, "txt_ids_dims": [], "vec_in_dim": None, "nerf_hidden_size": 64, "nerf_mlp_ratio": 4, "nerf_depth": 4,
              "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": head, "nerf_embedder_dtype": None, "use_x0": False,
              "use_sequential_txt_ids": False}  # fmt: skip
    theirs = comfyui.ask("architecture", module="chroma_radiance.model", model="ChromaRadiance", config=config)
    assert {name: tuple(shape) for name, shape in theirs["tensors"].items()} == shapes
    found = anatomy(shapes)
    assert CHROMA.measured({name: part.shape for name, part in found.parts.items()}) == sizes
    assert all(CHROMA.groups(name, part.shape) for name, part in found.parts.items())


@pytest.mark.parametrize("markers", [(), (X0,), (X0, SEQUENTIAL)])
def test_comfyui_takes_a_whole_radiance_with_its_markers(comfyui: ComfyUI, markers: tuple[str, ...]) -> None:
    shapes = {**CHROMA.shapes(RADIANCE, "comfyui"), **dict.fromkeys(markers, (0,))}
    answer = comfyui.ask("recognise", shapes={in_comfyui(name): list(shape) for name, shape in shapes.items()})
    assert (answer["config"], answer["missing"], answer["unexpected"]) == ("ChromaRadiance", [], [])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("sizes", "markers", "variant"),
    [
        (HD, (), "HD, Base or Flash"),
        (RADIANCE, (), "Radiance"),
        (RADIANCE, (X0, SEQUENTIAL), "Radiance that predicts pictures"),
    ],
)
def test_variants_are_told_apart(sizes: dict[str, int], markers: tuple[str, ...], variant: str, prefix: str) -> None:
    found = anatomy({**CHROMA.shapes(sizes, "comfyui"), **dict.fromkeys(markers, (0,))}, prefix)
    assert (found.family, found.layout, found.prefix) == (CHROMA, "comfyui", prefix)
    assert CHROMA.variant(found) == variant


def test_radiance_has_no_layout_of_diffusers() -> None:
    found = anatomy(CHROMA.shapes(RADIANCE, "comfyui"))
    assert CHROMA.config(found) is None
    with pytest.raises(FamilyError, match=r"Radiance.*diffusers has no class"):
        found.outputs("diffusers")


@pytest.mark.parametrize(
    ("group", "parts", "parameters"),
    [
        ("q", (19 * 2 + 38) * 2, (19 * 2 + 38) * 3072 * 3073),
        ("single", 38 * 12, 38 * (3 * 3072 * 3073 + 12288 * 3073 + 3072 * 15361 + 256)),
        ("approximator", 4 + 5 * 5, 5120 * 65 + 10 * 5120 * 5121 + 5 * 5120 + 3072 * 5121),
        ("ffn", (19 * 4 + 38 * 2) * 2, 19 * 2 * (12288 * 3073 + 3072 * 12289) + 38 * (12288 * 3073 + 3072 * 15361)),
    ],
)
@pytest.mark.parametrize("layout", CHROMA.layouts)
def test_groups_are_the_same_in_either_layout(layout: str, group: str, parts: int, parameters: int) -> None:
    found = anatomy(CHROMA.shapes(HD, layout))
    members = [part for part in found.parts.values() if group in CHROMA.groups(part.name, part.shape)]
    assert (len(members), sum(part.numel for part in members)) == (parts, parameters)
    assert not [part for part in found.parts if "modulation" in CHROMA.groups(part, ())]


def test_a_block_of_the_approximator_counts_as_one() -> None:
    assert CHROMA.block_of(f"{APPROXIMATOR}.layers.3.linear_1.weight") == (f"{APPROXIMATOR}.layers", 3)
