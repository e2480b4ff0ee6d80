"""Stable Diffusion 3's and 3.5's names, shapes and rows, against diffusers' model, diffusers' own converter and ComfyUI's classes and map."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from mergetool.arch import recognise
from mergetool.arch.families.sd3 import LARGE, MEDIUM, MEDIUM_3_5, SD3
from mergetool.arch.generic import GENERIC
from tests.arch.tables import table
from tests.oracles import ComfyUI

_MEDIUM = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192}
MODELS: dict[str, tuple[Mapping[str, int], dict[str, Any], int, int, int]] = {
    "3 Medium": (MEDIUM, _MEDIUM, 491, 683, 2_084_951_104),
    "3.5 Medium": (
        MEDIUM_3_5,
        {**_MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))}, 665, 909, 2_469_663_936,
    ),
    "3.5 Large or Large Turbo": (
        LARGE,
        {**_MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}, 923, 1227, 8_146_280_768,
    ),
}  # fmt: skip
"""The published sizes by variant: the table's, diffusers' config, tensors in ComfyUI's and diffusers' layout, parameters."""
TINY: Mapping[str, int] = {
    **MEDIUM_3_5, "dim": 128, "context": 64, "pooled": 32, "positions": 64, "second": 128, "transformer_blocks": 2, "dual_blocks": 1,
}  # fmt: skip


def of_diffusers(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        made = SD3Transformer2DModel(**config)
    return {name: tuple(value.shape) for name, value in made.state_dict().items()}


@pytest.mark.parametrize("variant", MODELS)
def test_names_and_shapes_are_those_of_the_diffusers_model(variant: str) -> None:
    sizes, config, native, own, parameters = MODELS[variant]
    shapes = SD3.shapes(sizes, "diffusers")
    assert shapes == of_diffusers(config)
    assert (len(SD3.shapes(sizes, "comfyui")), len(shapes)) == (native, own)
    assert sum(map(prod, shapes.values())) == parameters


@pytest.mark.parametrize(  # of diffusers' names it converts those without a prefix alone
    ("layout", "prefix"), [("comfyui", ""), ("comfyui", "model.diffusion_model."), ("diffusers", "")]
)
@pytest.mark.parametrize("variant", MODELS)
def test_comfyui_takes_a_whole_model_by_its_names_and_shapes(
    comfyui: ComfyUI, variant: str, layout: str, prefix: str
) -> None:
    sizes, _, tensors, _, _ = MODELS[variant]
    shapes = {prefix + name: list(shape) for name, shape in SD3.shapes(sizes, layout).items()}
    answer = comfyui.ask("recognise", shapes=shapes)
    assert answer == {"config": "SD3", "missing": [], "unexpected": [], "parameters": tensors, "log": []}


@pytest.mark.parametrize("variant", MODELS)
def test_every_name_that_comfyui_maps_means_the_same_rows(comfyui: ComfyUI, variant: str) -> None:
    sizes = MODELS[variant][0]
    names = comfyui.ask(
        "diffusers_names", function="mmdit_to_diffusers", config={"depth": sizes["transformer_blocks"]}
    )["names"]
    shapes = SD3.shapes(sizes, "comfyui")
    anatomy = recognise(table(shapes), source="f")
    for name, held in SD3.held(anatomy.parts, "diffusers").items():
        target, start, rows, swapped = names[name]
        windows = [anatomy.parts[part].stored for part in held]
        assert {one.tensor for one in windows} == {target}
        first, count = min(one.row for one in windows), sum(one.rows for one in windows)
        assert (first, count) == (start or 0, rows or shapes[target][0])
        assert (windows[0].row > windows[-1].row) == swapped


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_parts_are_what_diffusers_own_converter_makes(prefix: str) -> None:
    """Every row holds its own number, so that a row in the wrong place shows; columns are one column seen often."""
    stored = {
        prefix + name: torch.arange(shape[0]).view(-1, *(1 for _ in shape[1:])).expand(shape)
        for name, shape in SD3.shapes(TINY, "comfyui").items()
    }
    parts = recognise(table({name: tuple(value.shape) for name, value in stored.items()}), source="f").parts
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(stored))
    held = SD3.held(parts, "diffusers")
    assert held.keys() == converted.keys()
    for name, names in held.items():
        rows = [parts[part].stored for part in names]
        ours = torch.cat([stored[one.tensor][one.row : one.row + one.rows] for one in rows])
        assert torch.equal(ours, converted[name]), name


@pytest.mark.parametrize("layout", SD3.layouts)
@pytest.mark.parametrize("variant", MODELS)
def test_a_model_is_known_by_its_variant_and_written_back_under_its_own_names(variant: str, layout: str) -> None:
    sizes, config, *_ = MODELS[variant]
    found = recognise(table(SD3.shapes(sizes, layout)), source="f")
    assert (found.family, found.layout, SD3.variant(found)) == (SD3, layout, variant)
    assert dict(found.outputs(layout)) == found.stored_parts()
    derived = SD3.config(found)
    assert derived is not None
    assert derived.pop("_class_name") == "SD3Transformer2DModel"
    assert of_diffusers(derived) == of_diffusers(config)


@pytest.mark.parametrize("leaf", ["weight", "bias"])
@pytest.mark.parametrize(
    ("module", "native", "diffusers"),
    [
        ("norm_out.linear", "final_layer.adaLN_modulation.1", "norm_out.linear"),
        ("transformer_blocks.37.norm1_context.linear", "joint_blocks.37.context_block.adaLN_modulation.1", ""),
    ],
)
def test_two_modulations_have_their_halves_in_the_other_order(
    module: str, native: str, diffusers: str, leaf: str
) -> None:
    for layout, tensor, order in (
        ("comfyui", native, ("shift", "scale")),
        ("diffusers", diffusers or module, ("scale", "shift")),
    ):
        parts = recognise(table(SD3.shapes(LARGE, layout)), source="f").parts
        windows = [parts[f"{module}.{half}.{leaf}"].stored for half in order]
        assert [(w.tensor, w.row, w.rows) for w in windows] == [(f"{tensor}.{leaf}", row, 2432) for row in (0, 2432)]


def test_the_modulation_of_a_block_before_the_last_is_one_part() -> None:
    for layout in SD3.layouts:
        parts = recognise(table(SD3.shapes(LARGE, layout)), source="f").parts
        assert parts["transformer_blocks.23.norm1_context.linear.weight"].shape == (6 * 2432, 2432)


@pytest.mark.parametrize(("group", "parts"), [("attn2", 13 * 10), ("q", (24 * 2 + 13) * 2), ("modulation", 24 * 4 + 2 + 4), ("txt", 24 * 10 + 23 * 6 + 4), ("position", 1)])  # fmt: skip
def test_groups(group: str, parts: int) -> None:
    for layout in SD3.layouts:
        anatomy = recognise(table(SD3.shapes(MEDIUM_3_5, layout)), source="f")
        found = [part for part in anatomy.parts.values() if group in SD3.groups(part.name, part.shape)]
        assert len(found) == parts
        assert all(SD3.groups(part.name, part.shape) for part in anatomy.parts.values())


@pytest.mark.parametrize("extra", ["controlnet_blocks.0.weight", "pos_embed_input.proj.weight"])
def test_a_controlnet_is_not_one(extra: str) -> None:
    shapes = {**SD3.shapes(TINY, "diffusers"), extra: (128, 128)}
    assert recognise(table(shapes), source="f").family is GENERIC
