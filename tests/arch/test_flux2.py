"""Flux.2's names, shapes and rows against diffusers' model, and its three published sizes."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from mergetool.arch import Anatomy, recognise
from mergetool.arch.families.flux2 import DEV, FLUX2, KLEIN_4B, KLEIN_9B
from mergetool.errors import FamilyError
from tests.arch.tables import table

Shapes = dict[str, tuple[int, ...]]
PUBLISHED = {
    "dev": (DEV, {}),
    "Klein 9B": (KLEIN_9B, {"num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288, "guidance_embeds": False}),
    "Klein 4B": (KLEIN_4B, {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680, "guidance_embeds": False}),
}  # fmt: skip


def of_class(**config: Any) -> Shapes:
    with torch.device("meta"):
        model = Flux2Transformer2DModel(**config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def anatomy(shapes: Shapes, prefix: str = "") -> Anatomy:
    return recognise(table(shapes, prefix=prefix), source="f")


@pytest.mark.parametrize("variant", PUBLISHED)
def test_names_and_shapes_are_those_of_the_diffusers_model(variant: str) -> None:
    sizes, config = PUBLISHED[variant]
    shapes = FLUX2.shapes(sizes, "diffusers")
    assert shapes == of_class(**config)
    for layout in FLUX2.layouts:
        made = FLUX2.config(anatomy(FLUX2.shapes(sizes, layout)))
        assert made is not None
        assert of_class(**{key: value for key, value in made.items() if key != "_class_name"}) == shapes


@pytest.mark.parametrize("layout", FLUX2.layouts)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", PUBLISHED)
def test_variants_are_told_apart(variant: str, prefix: str, layout: str) -> None:
    found = anatomy(FLUX2.shapes(PUBLISHED[variant][0], layout), prefix)
    assert (found.family, found.layout, found.prefix, FLUX2.variant(found)) == (FLUX2, layout, prefix, variant)
    assert all(FLUX2.groups(name, part.shape) for name, part in found.parts.items())


@pytest.mark.parametrize(("variant", "parameters"), [("dev", 32.2e9), ("Klein 9B", 9.1e9), ("Klein 4B", 3.9e9)])
def test_published_sizes(variant: str, parameters: float) -> None:
    counts = [sum(map(prod, FLUX2.shapes(PUBLISHED[variant][0], layout).values())) for layout in FLUX2.layouts]
    assert counts[0] == counts[1]
    assert counts[0] == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize(
    ("layout", "tensor"),
    [("comfyui", "single_blocks.7.linear1"), ("diffusers", "single_transformer_blocks.7.attn.to_qkv_mlp_proj")],
)
def test_the_first_matrix_of_a_single_block_is_q_k_v_and_the_gated_feed_forward(layout: str, tensor: str) -> None:
    parts = anatomy(FLUX2.shapes(DEV, layout)).parts
    names = [*(f"attn.to_{letter}" for letter in "qkv"), "proj_mlp"]
    windows = [parts[f"single_transformer_blocks.7.{name}.weight"].stored for name in names]
    assert [(w.tensor, w.row, w.rows) for w in windows] == [
        (f"{tensor}.weight", row, rows) for row, rows in ((0, 6144), (6144, 6144), (12288, 6144), (18432, 36864))
    ]


def test_the_final_modulation_has_its_halves_in_the_other_order() -> None:
    for layout, tensor, order in (
        ("comfyui", "final_layer.adaLN_modulation.1.weight", ("shift", "scale")),
        ("diffusers", "norm_out.linear.weight", ("scale", "shift")),
    ):
        parts = anatomy(FLUX2.shapes(DEV, layout)).parts
        windows = [parts[f"norm_out.linear.{half}.weight"].stored for half in order]
        assert [(w.tensor, w.row, w.rows) for w in windows] == [(tensor, 0, 6144), (tensor, 6144, 6144)]


@pytest.mark.parametrize(
    ("group", "parts", "parameters"),
    [
        ("q", 5 * 2 + 20, (5 * 2 + 20) * 3072**2),
        ("ffn", 5 * 4 + 20 * 2, (5 * 2 * 9 + 20 * (6 + 4)) * 3072**2),
        ("modulation", 3 + 2, (6 + 6 + 3 + 2) * 3072**2),
        ("single", 20 * 7, 20 * (13 * 3072**2 + 256)),
    ],
)
@pytest.mark.parametrize("layout", FLUX2.layouts)
def test_groups_are_the_same_in_either_layout(layout: str, group: str, parts: int, parameters: int) -> None:
    found = anatomy(FLUX2.shapes(KLEIN_4B, layout))
    members = [part for part in found.parts.values() if group in FLUX2.groups(part.name, part.shape)]
    assert (len(members), sum(part.numel for part in members)) == (parts, parameters)


def test_a_linear1_of_flux1_is_refused() -> None:
    shapes = {**FLUX2.shapes(KLEIN_4B, "comfyui"), "single_blocks.0.linear1.weight": (7 * 3072, 3072)}
    with pytest.raises(FamilyError, match=r"linear1.weight.*wanted 3072 rows of q, .* and 18432 rows of proj_mlp"):
        anatomy(shapes)
