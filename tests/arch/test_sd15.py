"""Stable Diffusion 1's names, groups and sizes, held against the classes and maps of ComfyUI and diffusers at the published size."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from diffusers import UNet2DConditionModel

from mergetool.arch import recognise, select
from mergetool.arch.families.sd15 import SD15
from mergetool.options.multipliers import parse_setting
from mergetool.recipe.groups import resolve
from tests.arch.tables import table
from tests.oracles import ComfyUI

Shapes = dict[str, tuple[int, ...]]
PUBLISHED = {
    "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
"""What unet/config.json of the published model has beside diffusers' defaults."""
IN_COMFYUI = {
    "image_size": 32, "in_channels": 4, "model_channels": 320, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
    "num_heads": 8, "use_spatial_transformer": True, "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "context_dim": 768,
}  # fmt: skip
UNET = "model.diffusion_model."


def of_diffusers(**config: object) -> Shapes:
    with torch.device("meta"):
        made = UNet2DConditionModel(**{**PUBLISHED, **config})
    return {name: tuple(value.shape) for name, value in made.state_dict().items()}


def shapes(layout: str, **config: object) -> Shapes:
    return {SD15.stored_name(name, layout): shape for name, shape in of_diffusers(**config).items()}


def test_the_table_has_the_shapes_of_diffusers_class() -> None:
    wanted = of_diffusers()
    sizes = SD15.measured(wanted)
    assert sizes is not None
    assert SD15.shapes(sizes, "diffusers") == wanted
    assert len(wanted) == 686


def test_comfyuis_class_has_the_tensors_of_the_layout(comfyui: ComfyUI) -> None:
    answer = comfyui.ask(
        "architecture", module="modules.diffusionmodules.openaimodel", model="UNetModel", config=IN_COMFYUI
    )
    assert {name: tuple(shape) for name, shape in answer["tensors"].items()} == shapes("comfyui")


def test_every_name_is_the_one_of_comfyuis_map(comfyui: ComfyUI) -> None:
    theirs = comfyui.ask("diffusers_names", function="unet_to_diffusers", config=IN_COMFYUI)["names"]
    for name in of_diffusers():
        assert SD15.stored_name(name, "comfyui") == theirs[name][0]


@pytest.mark.parametrize("prefix", ["", UNET, "unet."])
@pytest.mark.parametrize("layout", SD15.layouts)
def test_either_layout_is_read_as_the_same_parts_and_written_as_the_other(layout: str, prefix: str) -> None:
    found = recognise(table(shapes(layout), prefix=prefix), source="sd15.safetensors")
    assert (found.family, found.layout, found.prefix) == (SD15, layout, prefix)
    assert {name: part.shape for name, part in found.parts.items()} == of_diffusers()
    for other in SD15.layouts:
        assert {name: found.parts[part].shape for name, (part,) in found.outputs(other)} == shapes(other)


@pytest.mark.parametrize(("channels", "variant"), [(4, None), (9, "inpainting"), (8, "InstructPix2Pix")])
@pytest.mark.parametrize("layout", SD15.layouts)
def test_more_channels_are_a_variant_and_diffusers_builds_it_from_the_config(
    layout: str, channels: int, variant: str | None
) -> None:
    found = recognise(table(shapes(layout, in_channels=channels)), source="f")
    assert (found.family, SD15.variant(found)) == (SD15, variant)
    config = SD15.config(found)
    assert config is not None
    assert config.pop("_class_name") == "UNet2DConditionModel"
    assert of_diffusers(**config) == of_diffusers(in_channels=channels)


@pytest.mark.parametrize(
    "other",
    [{"cross_attention_dim": 1024}, {"cross_attention_dim": 1024, "use_linear_projection": True}, {"use_linear_projection": True},
     {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 8, "cross_attention_dim": 1024}],
)  # fmt: skip
def test_other_unets_of_the_same_blocks_are_not_sd15(other: dict[str, object]) -> None:
    is_sd2 = other == {"cross_attention_dim": 1024, "use_linear_projection": True}
    assert recognise(table(of_diffusers(**other)), source="f").family.name == (
        "Stable Diffusion 2" if is_sd2 else "generic"
    )


@pytest.mark.parametrize(
    ("pattern", "part", "count"),
    [
        ("input_blocks.1", "down_blocks.0.attentions.0.proj_in.weight", 36),
        ("input_blocks.10-11", "down_blocks.3.resnets.1.conv2.bias", 20),
        ("output_blocks.2", "up_blocks.0.upsamplers.0.conv.weight", 14),
        ("output_blocks.11.attn2", "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight", 5),
        ("middle_block.1", "mid_block.attentions.0.norm.bias", 26),
    ],
)
def test_blocks_are_chosen_by_the_numbers_of_block_weight_tools(pattern: str, part: str, count: int) -> None:
    (found,) = select([pattern], recognise(table(shapes("diffusers")), source="f")).values()
    assert part in found
    assert len(found) == count


def test_a_gradient_runs_over_twelve_blocks() -> None:
    anatomy = recognise(table(shapes("comfyui")), source="f")
    found = resolve([parse_setting("input_blocks=linear(0,1)"), parse_setting("output_blocks=linear(1,0)")], anatomy)
    assert found["conv_in.weight"] == 0
    assert found["down_blocks.1.attentions.0.proj_in.weight"] == Fraction(4, 11)
    assert found["down_blocks.3.resnets.1.conv1.weight"] == 1
    assert found["up_blocks.3.resnets.2.conv1.weight"] == 0


def test_every_part_is_in_a_group_and_every_group_has_one() -> None:
    groups = [SD15.groups(part, shape) for part, shape in of_diffusers().items()]
    assert all(groups)
    assert frozenset[str]().union(*groups) == {*SD15.group_order}


# -- block weights -----------------------------------------------------------------------------------------------------------------

NAMES = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]


@pytest.mark.parametrize("layout", SD15.layouts)
def test_every_part_has_one_of_the_26_weights_of_block_weight_tools(layout: str) -> None:
    anatomy = recognise(table(shapes(layout)), source="f")
    found = select(NAMES, anatomy)
    assert sum(map(len, found.values())) == len(anatomy.parts) == len(frozenset[str]().union(*found.values()))
    assert found["BASE"] == {
        part for part in anatomy.parts if part.startswith(("time_embedding", "conv_norm_out", "conv_out"))
    }
    assert found["IN00"] == {"conv_in.weight", "conv_in.bias"}
    assert found["M00"] == {part for part in anatomy.parts if part.startswith("mid_block.")}
    for name, number in (("IN", 7), ("OUT", 3)):
        stack = {"IN": "input_blocks", "OUT": "output_blocks"}[name]
        (block,) = select([f"{stack}.{number}"], anatomy).values()
        assert found[f"{name}{number:02}"] == block


def test_a_block_and_a_group_of_it_are_chosen_together() -> None:
    (found,) = select(["IN04.attn2"], recognise(table(shapes("comfyui")), source="f")).values()
    assert {part.rpartition(".attn2")[0] for part in found} == {"down_blocks.1.attentions.0.transformer_blocks.0"}
