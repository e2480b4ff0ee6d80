"""Z-Image names and shapes, against diffusers' model and diffusers' own converter."""

from __future__ import annotations

from math import prod

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

from mergetool.arch import recognise
from mergetool.arch.families.z_image import REFERENCE_CONFIG, Z_IMAGE, reference_shapes
from tests.arch.tables import OMNI, TINY, anatomy, table


def diffusers_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = ZImageTransformer2DModel(**{**REFERENCE_CONFIG, **config})
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "config", [TINY, TINY | {"siglip_feat_dim": 24}, {}, OMNI], ids=["tiny", "tiny-omni", "real", "omni"]
)
def test_names_and_shapes_are_those_of_the_diffusers_model(config: dict[str, object]) -> None:
    assert reference_shapes(config, "diffusers") == diffusers_shapes(config)


@pytest.mark.parametrize(
    ("config", "layout", "tensors", "parameters"),
    [
        ({}, "comfyui", 453, 6_154_908_736),
        ({}, "diffusers", 521, 6_154_908_736),
        (OMNI, "diffusers", 551, 6_513_266_880),
        (OMNI, "comfyui", 479, 6_513_266_880),
        (TINY, "diffusers", 73, None),
        (TINY, "comfyui", 65, None),
    ],
)
def test_published_sizes(config: dict[str, object], layout: str, tensors: int, parameters: int | None) -> None:
    shapes = reference_shapes(config, layout)
    assert len(shapes) == tensors
    assert parameters in (None, sum(map(prod, shapes.values())))


def test_full_size_comfyui_names_and_shapes() -> None:
    """Written out by hand from the published file: one modulated block, one that is not, and all outside blocks."""
    shapes = reference_shapes({}, "comfyui")
    block = {
        "attention.qkv.weight": (11520, 3840),
        "attention.out.weight": (3840, 3840),
        "attention.q_norm.weight": (128,),
        "attention.k_norm.weight": (128,),
        "feed_forward.w1.weight": (10240, 3840),
        "feed_forward.w2.weight": (3840, 10240),
        "feed_forward.w3.weight": (10240, 3840),
        "attention_norm1.weight": (3840,),
        "attention_norm2.weight": (3840,),
        "ffn_norm1.weight": (3840,),
        "ffn_norm2.weight": (3840,),
    }
    modulation = {"adaLN_modulation.0.weight": (15360, 256), "adaLN_modulation.0.bias": (15360,)}
    outside_blocks = {
        "x_embedder.weight": (3840, 64),
        "x_embedder.bias": (3840,),
        "t_embedder.mlp.0.weight": (1024, 256),
        "t_embedder.mlp.0.bias": (1024,),
        "t_embedder.mlp.2.weight": (256, 1024),
        "t_embedder.mlp.2.bias": (256,),
        "cap_embedder.0.weight": (2560,),
        "cap_embedder.1.weight": (3840, 2560),
        "cap_embedder.1.bias": (3840,),
        "x_pad_token": (1, 3840),
        "cap_pad_token": (1, 3840),
        "final_layer.linear.weight": (64, 3840),
        "final_layer.linear.bias": (64,),
        "final_layer.adaLN_modulation.1.weight": (3840, 256),
        "final_layer.adaLN_modulation.1.bias": (3840,),
    }
    expected = dict(outside_blocks)
    for stack, count, inner in [
        ("layers", 30, block | modulation),
        ("noise_refiner", 2, block | modulation),
        ("context_refiner", 2, block),
    ]:
        expected |= {f"{stack}.{n}.{name}": shape for n in range(count) for name, shape in inner.items()}
    assert shapes == expected


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("config", [TINY, TINY | {"siglip_feat_dim": 24}, TINY | {"n_layers": 12}])
def test_parts_are_what_diffusers_own_converter_makes(config: dict[str, object], prefix: str) -> None:
    generator = torch.Generator().manual_seed(1)
    stored = {
        prefix + name: torch.randn(shape, generator=generator)
        for name, shape in reference_shapes(config, "comfyui").items()
    }
    found = recognise(table({name: tuple(tensor.shape) for name, tensor in stored.items()}), source="f")
    converted = convert_z_image_transformer_checkpoint_to_diffusers(dict(stored))

    assert found.parts.keys() == converted.keys()
    for name, part in found.parts.items():
        rows = stored[part.stored.tensor][part.stored.row : part.stored.row + part.stored.rows]
        assert torch.equal(rows, converted[name]), name
        assert part.shape == tuple(converted[name].shape)


def test_both_layouts_have_the_same_parts() -> None:
    comfyui, diffusers = anatomy({}, "comfyui"), anatomy({}, "diffusers")
    assert (comfyui.layout, diffusers.layout) == ("comfyui", "diffusers")
    assert comfyui.family is diffusers.family is Z_IMAGE
    assert {n: p.shape for n, p in comfyui.parts.items()} == {n: p.shape for n, p in diffusers.parts.items()}


def test_a_fused_tensor_is_three_windows_of_rows() -> None:
    parts = anatomy({}).parts
    windows = [parts[f"layers.7.attention.to_{x}.weight"].stored for x in "qkv"]
    assert [(w.tensor, w.row, w.rows) for w in windows] == [
        ("layers.7.attention.qkv.weight", 0, 3840),
        ("layers.7.attention.qkv.weight", 3840, 3840),
        ("layers.7.attention.qkv.weight", 7680, 3840),
    ]


def test_unequal_thirds_follow_the_head_counts() -> None:
    """24 query heads and 8 key and value heads of 96: 2304 + 768 + 768 rows."""
    shapes = reference_shapes({"dim": 2304, "n_heads": 24, "n_layers": 1, "n_refiner_layers": 1}, "comfyui")
    shapes["cap_embedder.1.weight"] = (2305, 2560)  # 2304 rows there would mean Lumina2
    for name in shapes:
        if name.endswith(".qkv.weight"):
            shapes[name] = (3840, 2304)
    parts = recognise(table(shapes), source="f").parts
    windows = [parts[f"layers.0.attention.to_{x}.weight"] for x in "qkv"]
    assert [(p.stored.row, p.stored.rows, p.shape) for p in windows] == [
        (0, 2304, (2304, 2304)),
        (2304, 768, (768, 2304)),
        (3072, 768, (768, 2304)),
    ]


def test_lora_modules_are_canonical_names_of_weights() -> None:
    assert Z_IMAGE.lora_module("layers.3.attention.to_out.0.weight") == "layers.3.attention.to_out.0"
    for name in ("x_pad_token", "cap_embedder.1.bias"):
        with pytest.raises(ValueError, match=name):
            Z_IMAGE.lora_module(name)


@pytest.mark.parametrize(
    "config", [{}, OMNI, {"dim": 256, "n_layers": 11, "n_refiner_layers": 3, "n_heads": 2, "cap_feat_dim": 40}]
)
@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_config_is_read_back_from_the_shapes(config: dict[str, object], layout: str) -> None:
    heads = config.get("n_heads", 30)
    derived = Z_IMAGE.config(anatomy(config, layout))
    assert derived == {"_class_name": "ZImageTransformer2DModel", **REFERENCE_CONFIG, **config, "n_kv_heads": heads}
    assert diffusers_shapes({k: v for k, v in derived.items() if k != "_class_name"}) == reference_shapes(
        config, "diffusers"
    )


def test_no_config_is_made_up_where_the_shapes_do_not_tell() -> None:
    assert Z_IMAGE.config(anatomy(TINY)) is None  # heads of 16: the rotary axes could be 8+4+4 or others
    incomplete = {name: shape for name, shape in reference_shapes({}, "comfyui").items() if "x_embedder" not in name}
    assert Z_IMAGE.config(recognise(table(incomplete), source="f")) is None
