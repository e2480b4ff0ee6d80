"""Wan's names, shapes and variants, against diffusers' models, diffusers' own converter and ComfyUI's classes."""

from __future__ import annotations

from math import prod
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from mergetool.arch import recognise, select
from mergetool.arch.families.wan import T2V_14B, WAN
from mergetool.options.multipliers import parse_setting
from mergetool.recipe.groups import resolve
from tests.arch.tables import table
from tests.oracles import ComfyUI

SMALL_T2V = {**T2V_14B, "dim": 1536, "hidden": 8960, "blocks": 30}
PICTURES = {"input": 36, "added": 5120, "image": 1280, "pictured": 5120}
VACE = {"vace": 5120, "vace_input": 96, "vace_blocks": 8}
TI2V = {**T2V_14B, "dim": 3072, "hidden": 14336, "input": 48, "output": 192, "blocks": 30}
MODELS: dict[str, tuple[dict[str, int], dict[str, Any], int, int]] = {
    "T2V 14B: 2.1, or 2.2's for high or low noise": (dict(T2V_14B), {}, 1095, 14_288_491_584),
    "2.1 T2V 1.3B": (SMALL_T2V, {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 825, 1_418_996_800),
    "2.1 I2V 14B": ({**T2V_14B, **PICTURES}, {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 1303, 16_394_878_784),
    "2.1 FLF2V 14B": (
        {**T2V_14B, **PICTURES, "tokens": 514},
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514}, 1304, 16_395_536_704,
    ),
    "2.2 I2V A14B, high or low noise": ({**T2V_14B, "input": 36}, {"in_channels": 36}, 1095, 14_288_901_184),
    "2.2 TI2V 5B": (
        TI2V, {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}, 825, 4_999_787_712,
    ),
    "VACE 14B": ({**T2V_14B, **VACE}, {"vace_layers": list(range(0, 40, 5))}, 1331, 17_337_592_896),
}  # fmt: skip
"""The published sizes by variant: the table's, diffusers' config, tensors and parameters."""
CLASSES = {"VACE 14B": "WanVACETransformer3DModel"}


def of_diffusers(variant: str, config: dict[str, Any] | None = None) -> dict[str, tuple[int, ...]]:
    """The tensors of diffusers' class at the published size."""
    made_by = getattr(diffusers, CLASSES.get(variant, "WanTransformer3DModel"))
    with torch.device("meta"):
        made = made_by(**(MODELS[variant][1] if config is None else config))
    return {name: tuple(value.shape) for name, value in made.state_dict().items()}


@pytest.mark.parametrize("variant", MODELS)
def test_names_and_shapes_are_those_of_the_diffusers_model(variant: str) -> None:
    sizes, _, tensors, parameters = MODELS[variant]
    shapes = WAN.shapes(sizes, "diffusers")
    assert shapes == of_diffusers(variant)
    assert (len(shapes), sum(map(prod, shapes.values()))) == (tensors, parameters)


COMFYUI = {"VACE 14B": "WAN21_Vace", "2.1 I2V 14B": "WAN21_I2V", "2.1 FLF2V 14B": "WAN21_I2V", "2.2 TI2V 5B": "WAN22_T2V",
           "2.2 I2V A14B, high or low noise": "WAN21_T2V"}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("variant", MODELS)
def test_comfyui_takes_a_whole_model_by_its_names_and_shapes(comfyui: ComfyUI, variant: str, prefix: str) -> None:
    shapes = {prefix + name: list(shape) for name, shape in WAN.shapes(MODELS[variant][0], "comfyui").items()}
    assert comfyui.ask("recognise", shapes=shapes) == {
        "config": COMFYUI.get(variant, "WAN21_T2V"),
        "missing": [],
        "unexpected": [],
        "parameters": MODELS[variant][2],
        "log": [],
    }


@pytest.mark.parametrize("variant", MODELS)
def test_every_name_is_the_one_of_diffusers_converter(variant: str) -> None:
    """The converter renames whatever lies under a name: here the name that mergetool gives it. It does not know the positions of FLF2V's pictures."""
    names = [name for name in WAN.shapes(MODELS[variant][0], "diffusers") if not name.endswith("pos_embed")]
    ours = {WAN.stored_name(name, "comfyui"): torch.tensor(i) for i, name in enumerate(names)}
    converted = convert_wan_transformer_to_diffusers({f"model.diffusion_model.{name}": t for name, t in ours.items()})
    assert {name: names[int(tensor)] for name, tensor in converted.items()} == {name: name for name in names}


@pytest.mark.parametrize("layout", WAN.layouts)
@pytest.mark.parametrize("variant", MODELS)
def test_a_model_is_known_by_its_variant_and_written_back_under_its_own_names(variant: str, layout: str) -> None:
    shapes = WAN.shapes(MODELS[variant][0], layout)
    found = recognise(table(shapes, prefix="model.diffusion_model."), source="f")
    assert (found.family, found.layout, WAN.variant(found)) == (WAN, layout, variant)
    assert dict(found.outputs(layout)) == _bare(found.stored_parts())
    assert {name: part.shape for name, part in found.parts.items()} == WAN.shapes(MODELS[variant][0], "diffusers")


def _bare(stored: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {name.removeprefix("model.diffusion_model."): parts for name, parts in stored.items()}


def test_the_norm_before_cross_attention_is_norm3_in_comfyui_and_norm2_in_diffusers() -> None:
    for layout, stored in (("comfyui", "blocks.7.norm3.bias"), ("diffusers", "blocks.7.norm2.bias")):
        assert WAN.stored_name("blocks.7.norm2.bias", layout) == stored
        anatomy = recognise(table(WAN.shapes(T2V_14B, layout)), source="f")
        assert anatomy.parts["blocks.7.norm2.bias"].stored.tensor == stored


@pytest.mark.parametrize(
    ("extra", "variant"),
    [
        ("control_adapter.conv.weight", "2.2 Fun Camera"),
        ("casual_audio_encoder.encoder.final_linear.weight", "2.2 S2V"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "2.2 Animate"),
    ],
)
def test_what_is_built_on_it_is_named_and_keeps_its_own_tensors(extra: str, variant: str) -> None:
    found = recognise(table({**WAN.shapes(T2V_14B, "comfyui"), extra: (4, 4)}), source="f")
    assert (found.family, WAN.variant(found)) == (WAN, variant)
    assert found.parts[extra].stored.tensor == extra
    assert WAN.config(found) is None


@pytest.mark.parametrize(
    ("group", "parts", "parameters"),
    [
        ("self_attn", 40 * 10, 40 * (4 * 5120 * 5121 + 2 * 5120)),
        ("cross_attn", 40 * 13 + 40 * 2, 40 * (6 * 5120 * 5121 + 3 * 5120)),
        ("k", 40 * 6, 40 * 3 * 5120 * 5121),
        ("ffn", 40 * 4, 40 * (2 * 5120 * 13824 + 5120 + 13824)),
        ("modulation", 41, 41 * 0 + (40 * 6 + 2) * 5120),
        ("image", 40 * 5 + 8, 40 * (2 * 5120 * 5121 + 5120) + 1280 * 2 + 1280 * 1281 + 5120 * 1281 + 2 * 5120),
        ("norm", 40 * 7 + 4, 40 * 7 * 5120 + 2 * 1280 + 2 * 5120),
    ],
)
def test_groups(group: str, parts: int, parameters: int) -> None:
    for layout in WAN.layouts:
        anatomy = recognise(table(WAN.shapes(MODELS["2.1 I2V 14B"][0], layout)), source="f")
        members = [part for part in anatomy.parts.values() if group in WAN.groups(part.name, part.shape)]
        assert (len(members), sum(part.numel for part in members)) == (parts, parameters)
        assert all(WAN.groups(part.name, part.shape) for part in anatomy.parts.values())


@pytest.mark.parametrize("pattern", ["blocks.3.self_attn.q", "blocks.3.attn1.to_q"])
def test_parts_are_chosen_by_the_names_of_either_layout(pattern: str) -> None:
    (found,) = select([pattern], recognise(table(WAN.shapes(T2V_14B, "diffusers")), source="f")).values()
    assert found == {"blocks.3.attn1.to_q.weight", "blocks.3.attn1.to_q.bias"}


def test_a_gradient_runs_over_the_blocks() -> None:
    found = resolve([parse_setting("blocks=linear(0,1)")], recognise(table(WAN.shapes(T2V_14B, "comfyui")), source="f"))
    assert [found[f"blocks.{n}.ffn.net.2.weight"] * 39 for n in (0, 13, 39)] == [0, 13, 39]


@pytest.mark.parametrize("variant", MODELS)
def test_the_config_makes_a_model_of_the_same_shapes(variant: str) -> None:
    shapes = WAN.shapes(MODELS[variant][0], "comfyui")
    config = WAN.config(recognise(table(shapes), source="f"))
    assert config is not None
    assert config.pop("_class_name") == CLASSES.get(variant, "WanTransformer3DModel")
    assert of_diffusers(variant, config) == of_diffusers(variant)
    assert config.get("vace_layers") == MODELS[variant][1].get("vace_layers")
