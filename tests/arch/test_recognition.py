"""Which files are Z-Image, which are something else, and which are refused by name."""

from __future__ import annotations

import re

import pytest

from mergetool.arch import recognise
from mergetool.arch.families.lumina2 import LUMINA2
from mergetool.arch.families.z_image import Z_IMAGE, reference_shapes
from mergetool.arch.generic import GENERIC
from mergetool.checkpoint.header import TensorInfo
from mergetool.errors import FamilyError
from tests.arch.tables import TINY, anatomy, table, z_image

PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "transformer."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_z_image_is_found_under_every_prefix(prefix: str, layout: str) -> None:
    found = anatomy(TINY, layout, prefix)
    assert (found.family, found.layout, found.prefix) == (Z_IMAGE, layout, prefix)
    assert found.parts.keys() == reference_shapes(TINY, "diffusers").keys()
    assert all(part.stored.tensor.startswith(prefix) for part in found.parts.values())


def test_an_all_in_one_checkpoint_keeps_its_other_models_outside() -> None:
    others = {"vae.decoder.conv_in.weight": (4, 4), "text_encoders.qwen3_4b.transformer.model.norm.weight": (4,)}
    tensors = z_image(prefix="model.diffusion_model.") | table(others)
    found = recognise(tensors, source="f")
    assert set(found.outside) == set(others)
    assert len(found.parts) == 73


def test_bundled_models_are_outside_without_a_prefix_too() -> None:
    found = recognise(z_image() | table({"vae.encoder.conv_in.weight": (4, 4)}), source="f")
    assert found.outside.keys() == {"vae.encoder.conv_in.weight"}


def test_markers_and_scales_are_beside_the_weights() -> None:
    found = recognise(z_image() | table({"scaled_fp8": (0,), "layers.0.feed_forward.w1.scale_weight": ()}), source="f")
    assert found.sides == ("scaled_fp8", "layers.0.feed_forward.w1.scale_weight")


def test_missing_and_extra_tensors_are_left_to_the_merge() -> None:
    tensors = z_image() | table({"layers.0.attention.gate.weight": (2, 32), "novelty.weight": (3,)})
    del tensors["layers.1.feed_forward.w2.weight"]
    found = recognise(tensors, source="f")
    assert found.parts.keys() == (reference_shapes(TINY, "diffusers").keys() - {"layers.1.feed_forward.w2.weight"}) | {
        "layers.0.attention.gate.weight",
        "novelty.weight",
    }


def test_unused_norm_final_is_a_part_that_says_so() -> None:
    found = recognise(z_image() | table({"norm_final.weight": (32,)}), source="f")
    assert "norm_final.weight" in found.parts
    assert found.family.unused == {"norm_final.weight"}


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_flat_pad_tokens_are_the_same_parts(layout: str) -> None:
    shapes = reference_shapes(TINY, layout) | {"x_pad_token": (32,)}
    part = recognise(table(shapes), source="f").parts["x_pad_token"]
    assert part.shape == (1, 32)
    assert part.stored.rows == 32


@pytest.mark.parametrize("extra", ["layers.0.attention.to_q.weight", "noise_refiner.0.attention.to_v.weight"])
def test_fused_and_split_in_one_block_is_refused(extra: str) -> None:
    with pytest.raises(FamilyError, match=f'"{extra.replace("to_q", "qkv").replace("to_v", "qkv")}" and "{extra}"'):
        recognise(z_image() | table({extra: (32, 32)}), source="f")


def test_one_tensor_under_both_its_names_is_refused() -> None:
    with pytest.raises(FamilyError, match=r'"x_embedder.bias" and "all_x_embedder.2-1.bias"'):
        recognise(z_image() | table({"all_x_embedder.2-1.bias": (32,)}), source="f")


def test_two_transformers_in_one_file_are_refused() -> None:
    with pytest.raises(FamilyError, match=r'"model.diffusion_model." and ""'):
        recognise(z_image() | z_image(prefix="model.diffusion_model."), source="f")


def with_shape(tensor: str, shape: tuple[int, ...]) -> dict[str, TensorInfo]:
    return table(reference_shapes(TINY, "comfyui") | {tensor: shape})


@pytest.mark.parametrize(
    ("tensor", "shape", "wanted"),
    [
        ("layers.1.attention.qkv.weight", (97, 32), "32 rows of q"),
        ("layers.1.attention.qkv.weight", (32, 32), "32 rows of q"),
        ("layers.1.attention.qkv.weight", (), "32 rows of q"),
        ("layers.1.attention.qkv.weight", (52, 32), "whole heads of 16 rows"),
        ("layers.1.attention.q_norm.weight", (24,), "whole heads of 24 rows"),
        ("layers.1.attention.q_norm.weight", (0,), "whole heads of 0 rows"),
    ],
)
def test_a_fused_tensor_that_cannot_be_split_is_refused(tensor: str, shape: tuple[int, ...], wanted: str) -> None:
    with pytest.raises(FamilyError, match=r'"layers.1.attention.qkv.weight" has shape \[.*' + wanted):
        recognise(with_shape(tensor, shape), source="f")


def test_a_block_without_output_projection_splits_like_the_others() -> None:
    tensors = z_image()
    del tensors["layers.1.attention.out.weight"]
    assert recognise(tensors, source="f").parts["layers.1.attention.to_k.weight"].stored.row == 32


def test_a_file_without_any_output_projection_cannot_be_split() -> None:
    tensors = {name: info for name, info in z_image().items() if not name.endswith(".out.weight")}
    with pytest.raises(FamilyError, match=r"attention\.to_out\.0\.weight.*rows of q"):
        recognise(tensors, source="f")


def test_lumina2_is_not_z_image() -> None:
    shapes = reference_shapes({"dim": 2304, "n_heads": 24, "n_layers": 1}, "comfyui")
    assert recognise(table(shapes), source="f").family is GENERIC
    small = {
        name.replace("adaLN_modulation.0", "adaLN_modulation.1"): shape
        for name, shape in reference_shapes(TINY, "comfyui").items()
    }
    assert recognise(table(small), source="f").family is LUMINA2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora_controlnet", "a ControlNet-LoRA"),
        ("diffusion_model.layers.0.attention.to_q.lora_A.weight", "a LoRA file"),
        ("layers.0.attention.to_q.lora_B.default.weight", "a LoRA file"),
        ("lora_unet_layers_0_feed_forward_w1.lora_down.weight", "a LoRA file"),
        ("transformer.layers.0.attention.to_q_lora.up.weight", "a LoRA file"),
        ("unet.down.attn.to_q.lora.up.weight", "a LoRA file"),
        ("diffusion_model.layers.0.ffn_norm1.diff", "a LoRA (whole difference) file"),
        ("diffusion_model.x_embedder.diff_b", "a LoRA (whole difference) file"),
        ("lycoris_layers_0_attention_to_q.lokr_w1", "a LoRA (LoKr) file"),
        ("diffusion_model.layers.0.attention.to_q.lokr_w2_a", "a LoRA (LoKr) file"),
        ("lora_unet_layers_0.hada_w1_b", "a LoRA (LoHa) file"),
        ("layers.0.attention.to_q.dora_scale", "a LoRA (DoRA) file"),
        ("transformer.layers.0.attention.to_q.oft_R.weight", "a LoRA (OFT) file"),
        ("diffusion_model.layers.0.attention.to_q.oft_blocks", "a LoRA (OFT) file"),
        ("base_model.model.layers.0.attention.to_q.boft_R", "a LoRA (BOFT) file"),
        ("base_model.model.layers.0.attention.to_q.vera_lambda_b.default", "a LoRA (VeRA) file"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "a LoRA (xlabs LoRA) file"),
    ],
)
def test_other_files_are_refused_by_name(name: str, says: str) -> None:
    for tensors in (table({name: (4, 4)}), z_image() | table({name: (4, 4)})):
        with pytest.raises(FamilyError, match=rf'^"my file" is {re.escape(says)}') as caught:
            recognise(tensors, source="my file")
        assert name in str(caught.value)


def test_the_four_factors_of_one_module_together_are_a_glora() -> None:
    factors = {f"layers.0.mlp.{name}.weight": (4, 4) for name in ("a1", "a2", "b1", "b2")}
    with pytest.raises(FamilyError, match=r"a LoRA \(GLoRA\) file.*in the program that it is for"):
        recognise(table(factors), source="f")
    del factors["layers.0.mlp.b2.weight"]
    assert recognise(table(factors), source="f").family is GENERIC


def test_blocks_of_four_dimensions_are_a_boft() -> None:
    with pytest.raises(FamilyError, match=r"a LoRA \(BOFT\) file"):
        recognise(table({"layers.0.mlp.oft_blocks": (2, 4, 4, 4)}), source="f")


@pytest.mark.parametrize(
    "name",
    [
        "x.alpha",
        "x.a1.weight",
        "norm.query_norm.scale",
        "layers.0.difference.weight",
        "exploration_A.weight",
        "control.weight",
        "a.lora_norm.weight",
    ],
)
def test_names_that_only_look_alike_are_not_refused(name: str) -> None:
    assert recognise(table({name: (4, 4)}), source="f").family is GENERIC


def test_a_file_without_tensors_is_refused() -> None:
    with pytest.raises(FamilyError, match="no tensors"):
        recognise({}, source="f")


def test_hostile_names_do_not_reach_the_terminal() -> None:
    with pytest.raises(FamilyError) as caught:
        recognise(table({"\x1b[2J.lora_A.weight": (1, 1)}), source="f")
    assert "\x1b" not in str(caught.value)
