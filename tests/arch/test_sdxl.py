"""SDXL's names, groups and sizes, held against the classes and maps of ComfyUI and diffusers at the published size."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from mergetool.arch import Anatomy, describe, recognise, select
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.arch.generic import GENERIC
from mergetool.options.multipliers import parse_setting
from mergetool.recipe.groups import resolve
from tests.arch.tables import table
from tests.oracles import ComfyUI
from tests.sdxl import PUBLISHED, PUBLISHED_IN_COMFYUI, SMALL, UNET, Shapes, shapes

LAYOUTS = ("comfyui", "diffusers")


def anatomy(layout: str = "diffusers", prefix: str = "") -> Anatomy:
    return recognise(table(shapes(PUBLISHED, layout), prefix=prefix), source="sdxl.safetensors")


# -- names -------------------------------------------------------------------------------------------------------------------


def test_comfyuis_class_has_the_tensors_of_the_layout(comfyui: ComfyUI) -> None:
    answer = comfyui.ask(
        "architecture",
        module="modules.diffusionmodules.openaimodel",
        model="UNetModel",
        config=dict(PUBLISHED_IN_COMFYUI),
    )
    assert {name: tuple(shape) for name, shape in answer["tensors"].items()} == shapes(PUBLISHED, "comfyui")
    assert len(answer["tensors"]) == 1680


def test_every_name_is_the_one_of_comfyuis_map(comfyui: ComfyUI) -> None:
    theirs = comfyui.ask("diffusers_names", function="unet_to_diffusers", config=dict(PUBLISHED_IN_COMFYUI))["names"]
    for name in shapes(PUBLISHED):  # its map also has what only other UNets have
        assert SDXL_UNET.stored_name(name, "comfyui") == theirs[name][0]


@pytest.mark.parametrize("prefix", ["", UNET, "unet."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_either_layout_is_read_as_the_same_parts_and_written_as_the_other(layout: str, prefix: str) -> None:
    found = anatomy(layout, prefix)
    assert (found.family, found.layout, found.prefix) == (SDXL_UNET, layout, prefix)
    assert {name: part.shape for name, part in found.parts.items()} == shapes(PUBLISHED)
    for other in LAYOUTS:
        assert {name: found.parts[part].shape for name, (part,) in found.outputs(other)} == shapes(PUBLISHED, other)


def test_a_file_of_both_layouts_is_refused() -> None:
    both = {**shapes(SMALL, "comfyui"), "conv_in.weight": (32, 4, 3, 3)}
    with pytest.raises(Exception, match=r'"input_blocks.0.0.weight" and "conv_in.weight" both hold "conv_in.weight"'):
        recognise(table(both), source="mixed.safetensors")


@pytest.mark.parametrize("config", [PUBLISHED, SMALL], ids=["published", "small"])
def test_the_table_has_the_shapes_of_diffusers_class(config: dict[str, object]) -> None:
    wanted = shapes(config)
    sizes = SDXL_UNET.measured(wanted)
    assert sizes is not None
    assert SDXL_UNET.shapes(sizes, "diffusers") == wanted


# -- what is SDXL ------------------------------------------------------------------------------------------------------------

SD1 = {"sample_size": 64, "block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 768, "attention_head_dim": 8}
REFINER = {
    **PUBLISHED,
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 1,
    "attention_head_dim": [1, 1, 1, 1],
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}
KOALA = {**SMALL, "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 2]}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_inpainting_model_is_sdxl(layout: str) -> None:
    found = recognise(table(shapes({**SMALL, "in_channels": 9}, layout)), source="inpaint.safetensors")
    assert found.family is SDXL_UNET
    assert found.parts["conv_in.weight"].shape == (32, 9, 3, 3)


@pytest.mark.parametrize("depths", [[1, 1, 2], [1, 2, 4]], ids=["as Vega", "as SSD-1B"])
def test_its_smaller_kin_is_sdxl(depths: list[int]) -> None:
    config = {**SMALL, "transformer_layers_per_block": depths, "mid_block_type": "UNetMidBlock2D"}
    assert recognise(table(shapes(config)), source="kin.safetensors").family is SDXL_UNET


OTHERS: dict[str, tuple[dict[str, object], str]] = {
    "SD2": ({**SD1, "cross_attention_dim": 1024, "use_linear_projection": True}, "UNet2DConditionModel"),
    "the refiner": (REFINER, "UNet2DConditionModel"),
    "KOALA": (KOALA, "UNet2DConditionModel"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_unets_are_read_under_their_own_names(other: str) -> None:
    config, name = OTHERS[other]
    own = shapes(config, name=name)
    found = recognise(table(own), source="other.safetensors")
    assert found.family.name == {"SD2": "Stable Diffusion 2", "the refiner": "SDXL refiner"}.get(other, "generic")
    assert found.parts.keys() == own.keys()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("label_emb.0.0.weight", (128, 2560)),
        ("input_blocks.5.1.transformer_blocks.0.attn2.to_k.weight", (64, 1280)),
        ("input_blocks.0.0.weight", (32, 4)),
    ],
)
def test_another_embedder_context_or_first_layer_is_not_sdxl(name: str, shape: tuple[int, ...]) -> None:
    assert recognise(table({**shapes(SMALL, "comfyui"), name: shape}), source="x.safetensors").family is GENERIC


# -- groups ------------------------------------------------------------------------------------------------------------------

ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.1"
GROUPS = {
    "conv_in.weight": {"input_blocks", "conv_in"},
    "time_embedding.linear_1.bias": {"embedder"},
    "add_embedding.linear_2.weight": {"embedder"},
    "down_blocks.0.resnets.1.conv1.weight": {"input_blocks", "resnet"},
    "down_blocks.0.resnets.1.norm2.bias": {"input_blocks", "resnet", "norm"},
    "down_blocks.0.resnets.0.time_emb_proj.weight": {"input_blocks", "resnet"},
    "up_blocks.0.resnets.0.conv_shortcut.weight": {"output_blocks", "resnet"},
    "down_blocks.0.downsamplers.0.conv.weight": {"input_blocks", "resnet"},
    "up_blocks.1.upsamplers.0.conv.bias": {"output_blocks", "resnet"},
    "mid_block.resnets.1.conv2.weight": {"middle_block", "resnet"},
    "mid_block.attentions.0.proj_in.weight": {"middle_block", "proj"},
    "mid_block.attentions.0.norm.weight": {"middle_block", "norm"},
    f"{ATTENTION}.attn1.to_q.weight": {"input_blocks", "attention", "attn1", "q"},
    f"{ATTENTION}.attn2.to_k.weight": {"input_blocks", "attention", "attn2", "k"},
    f"{ATTENTION}.attn2.to_v.weight": {"input_blocks", "attention", "attn2", "v"},
    f"{ATTENTION}.attn1.to_out.0.bias": {"input_blocks", "attention", "attn1", "out"},
    f"{ATTENTION}.ff.net.0.proj.weight": {"input_blocks", "ffn"},
    f"{ATTENTION}.ff.net.2.bias": {"input_blocks", "ffn"},
    f"{ATTENTION}.norm3.weight": {"input_blocks", "norm"},
    "conv_norm_out.weight": {"final", "norm"},
    "conv_out.bias": {"final"},
}


@pytest.mark.parametrize("part", GROUPS)
def test_a_part_is_in_these_groups(part: str) -> None:
    assert SDXL_UNET.groups(part, shapes(PUBLISHED)[part]) == GROUPS[part]


def test_every_part_is_in_a_group_and_every_group_has_one() -> None:
    found = Counter(group for part, shape in shapes(PUBLISHED).items() for group in SDXL_UNET.groups(part, shape))
    assert found.keys() == {*SDXL_UNET.group_order}
    assert all(SDXL_UNET.groups(part, shape) for part, shape in shapes(PUBLISHED).items())


def test_the_groups_have_the_published_sizes() -> None:
    """Counted by hand from the widths: 70 transformer blocks, of which 10 are 640 wide."""
    sizes = {group.name: group.parameters for group in describe(anatomy()).groups}
    blocks = ((640, 10), (1280, 60))
    assert sizes["attn1"] == sum(n * (4 * width**2 + width) for width, n in blocks)
    assert sizes["attn2"] == sum(n * (2 * width**2 + 2 * 2048 * width + width) for width, n in blocks)
    assert sizes["ffn"] == sum(n * (12 * width**2 + 9 * width) for width, n in blocks)
    assert sizes["proj"] == sum(n * 2 * (width**2 + width) for width, n in ((640, 5), (1280, 6)))
    assert describe(anatomy()).total.parameters == 2_567_463_684


@pytest.mark.parametrize(
    ("pattern", "part", "count"),
    [
        ("input_blocks.4", "down_blocks.1.attentions.0.proj_in.weight", 58),
        ("input_blocks.0-3", "conv_in.bias", 24),
        ("down_blocks.0-1", "down_blocks.1.downsamplers.0.conv.weight", 138),
        ("input_blocks.4.attn2", f"{ATTENTION}.attn2.to_q.weight", 10),
        ("output_blocks.3-5.ffn", "up_blocks.1.attentions.2.transformer_blocks.0.ff.net.2.weight", 24),
        ("middle_block.1", "mid_block.attentions.0.norm.bias", 206),
        ("attn2.k", f"{ATTENTION}.attn2.to_k.weight", 70),
        ("out.2", "conv_out.bias", 2),
        ("label_emb", "add_embedding.linear_1.weight", 4),
    ],
)
def test_blocks_are_chosen_by_the_numbers_of_either_layout(pattern: str, part: str, count: int) -> None:
    (found,) = select([pattern], anatomy()).values()
    assert part in found
    assert len(found) == count


def test_a_gradient_runs_over_the_blocks_as_block_weight_tools_number_them() -> None:
    found = resolve([parse_setting("input_blocks=linear(0,1)"), parse_setting("output_blocks=linear(1,0)")], anatomy())
    assert found["conv_in.weight"] == 0
    assert found["down_blocks.1.attentions.0.proj_in.weight"] == Fraction(1, 2)  # input_blocks.4 of 0 to 8
    assert found["down_blocks.2.resnets.1.conv1.weight"] == 1
    assert found["up_blocks.0.attentions.2.proj_in.weight"] == Fraction(3, 4)  # output_blocks.2 of 0 to 8
    assert found["up_blocks.2.resnets.2.conv1.weight"] == 0


def test_what_is_outside_the_blocks_is_in_none() -> None:
    outside = {part for part in shapes(PUBLISHED) if SDXL_UNET.block_of(part) is None}
    assert outside == {part for part in shapes(PUBLISHED) if SDXL_UNET.groups(part, ()) & {"embedder", "final"}}


def test_the_order_is_that_of_the_forward_pass() -> None:
    tops = [name.split(".")[0] for name, _ in anatomy().outputs("comfyui")]
    expected = ["time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out"]
    assert list(dict.fromkeys(tops)) == expected
    numbers = [int(name.split(".")[1]) for name, _ in anatomy().outputs("comfyui") if name.startswith("output_blocks.")]
    assert numbers == sorted(numbers)


# -- config ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [PUBLISHED, SMALL, {**SMALL, "in_channels": 9}], ids=["published", "small", "inpaint"]
)
def test_diffusers_builds_the_same_model_from_the_config(config: dict[str, object]) -> None:
    wanted: Shapes = shapes(config)
    found = SDXL_UNET.config(recognise(table(wanted), source="x"))
    assert found is not None
    assert found["_class_name"] == "UNet2DConditionModel"
    assert shapes({key: value for key, value in found.items() if key != "_class_name"}) == wanted
    assert {key: found[key] for key in config} == config


def test_blocks_of_several_depths_have_no_config() -> None:
    uneven = {
        name: shape
        for name, shape in shapes(SMALL).items()
        if "up_blocks.0.attentions.1.transformer_blocks.1" not in name
    }
    assert SDXL_UNET.config(recognise(table(uneven), source="x")) is None
