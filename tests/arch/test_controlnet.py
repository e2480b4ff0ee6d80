"""ControlNets: their names held against diffusers' class and converter, and the signs of those that have no table."""

from __future__ import annotations

import ast

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

from mergetool.arch import recognise
from mergetool.arch.families import FAMILIES
from mergetool.arch.generic import GENERIC
from mergetool.arch.meeting import check_families
from mergetool.errors import FamilyError
from tests.arch.tables import table
from tests.controlnets import KINDS, shapes
from tests.sdxl import shapes as of_unet


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_the_one_of_diffusers_converter(kind: str) -> None:
    """Apart from the embedder of pooled text, which it forgets: it reads no single file of SDXL's."""
    family, config = KINDS[kind]
    ours = {f"control_model.{family.stored_name(name, 'comfyui')}": name for name in shapes(config)}
    assert convert_controlnet_checkpoint(ours, {"layers_per_block": 2}) == {
        name: name for name in ours.values() if not name.startswith("add_embedding")
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_either_layout_is_read_as_the_same_parts_and_shown_to_one_family(kind: str, prefix: str) -> None:
    family, config = KINDS[kind]
    wanted = shapes(config)
    for layout in family.layouts:
        stored = table({family.stored_name(name, layout): shape for name, shape in wanted.items()})
        assert [one for one in FAMILIES if one.shows(stored)] == [family]
        found = recognise({f"{prefix}{name}": info for name, info in stored.items()}, source="control.safetensors")
        assert (found.family, found.layout, found.prefix) == (family, layout, prefix)
        assert {name: part.shape for name, part in found.parts.items()} == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_the_shapes_of_diffusers_class_and_the_config_builds_it(kind: str) -> None:
    family, config = KINDS[kind]
    wanted = shapes(config)
    sizes = family.measured(wanted)
    assert sizes is not None
    assert family.shapes(sizes, "diffusers") == wanted
    made = family.config(recognise(table(wanted), source="control.safetensors"))
    assert made is not None
    del made["_class_name"]
    with torch.device("meta"):
        built = ControlNetModel(**ast.literal_eval(repr(made)))
    assert {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()} == wanted


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("controlnet_cond_embedding.conv_in.weight", "task_embedding"), "union of SDXL ControlNet"),
        (("controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale"), "ControlNet (xlabs) of Flux.1"),
        (("controlnet_blocks.0.linear.weight",), "ControlNet (MistoLine) of Flux.1"),
        (("controlnet_x_embedder.weight", "controlnet_blocks.0.weight", "controlnet_mode_embedder.weight",
          "time_text_embed.text_embedder.linear_1.weight"), "ControlNet union of Flux.1"),
        (("controlnet_blocks.0.weight", "pos_embed_input.proj.weight"), "ControlNet of SD3"),
        (("controlnet_blocks.0.weight", "controlnet_x_embedder.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight"),
         "ControlNet of Qwen-Image"),
        (("control_blocks.0.after_proj.weight", "control_img_in.weight"), "ControlNet (Fun) of Qwen-Image"),
        (("model.diffusion_model.control_layers.0.attention.qkv.weight",), "ControlNet of Z-Image"),
        (("adapter.body.0.resnets.0.block1.weight",), "T2I adapter"),
        (("conv_in.weight", "body.0.block2.weight"), "T2I adapter"),
        (("control_model.zero_convs.0.0.weight", "control_model.input_hint_block.0.weight"), "ControlNet"),
        (("blocks.0.weight",), None),
    ],
)  # fmt: skip
def test_others_are_told_by_the_tensors_that_comfyui_looks_at(names: tuple[str, ...], kind: str | None) -> None:
    found = recognise(table(dict.fromkeys(names, (4, 4))), source="control.safetensors")
    assert found.family is GENERIC
    assert found.family.variant(found) == kind


def test_a_controlnet_meets_its_model_by_name_only() -> None:
    _, config = KINDS["SDXL"]
    control, unet = (
        type("Model", (), {"name": name, "anatomy": recognise(table(found), source=name)})
        for name, found in (("control", shapes(config)), ("unet", of_unet()))
    )
    for pair in ((control, unet), (unet, control)):
        with pytest.raises(FamilyError, match=r"control is an SDXL ControlNet .*name what is to be changed"):
            check_families(*pair)
        check_families(*pair, by_name=True)
