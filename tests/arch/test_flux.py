"""Flux.1's names, shapes and rows, against diffusers' model and diffusers' own converter."""

from __future__ import annotations

from math import prod

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from mergetool.arch import recognise
from mergetool.arch.families.flux import DEV, FLUX
from mergetool.arch.generic import GENERIC
from mergetool.errors import FamilyError
from tests.arch.tables import table
from tests.oracles import ComfyUI
from tests.oracles.case import in_comfyui

SCHNELL = {size: value for size, value in DEV.items() if size != "guidance"}
FILL = {**DEV, "patch_in": 384}
ONE = {**DEV, "transformer_blocks": 1, "single_transformer_blocks": 1}
NORMS = ("query_norm", "key_norm")


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        (DEV, {"guidance_embeds": True}),
        (SCHNELL, {"guidance_embeds": False}),
        (FILL, {"guidance_embeds": True, "in_channels": 384, "out_channels": 64}),
    ],
    ids=["dev", "schnell", "Fill"],
)
def test_names_and_shapes_are_those_of_the_diffusers_model(sizes: dict[str, int], config: dict[str, object]) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(**config)
    assert FLUX.shapes(sizes, "diffusers") == {name: tuple(value.shape) for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("layout", "tensors"), [("comfyui", 780), ("diffusers", 1160)])
def test_published_sizes(layout: str, tensors: int) -> None:
    shapes = FLUX.shapes(DEV, layout)
    assert (len(shapes), sum(map(prod, shapes.values()))) == (tensors, 11_901_408_320)


@pytest.mark.parametrize("leaf", ["scale", "weight"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_parts_are_what_diffusers_own_converter_makes(prefix: str, leaf: str) -> None:
    """Every row holds its own number, so that a row in the wrong place shows; columns are one column seen often."""
    shapes = FLUX.shapes(ONE, "comfyui")
    stored = {
        name: torch.arange(shape[0], dtype=torch.int16).view(-1, *(1 for _ in shape[1:])).expand(shape)
        for name, shape in shapes.items()
    }
    named = {f"{prefix}{name.replace('_norm.scale', f'_norm.{leaf}')}": shape for name, shape in shapes.items()}
    parts = recognise(table(named), source="f").parts
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(stored))
    by_tensor = {f"{prefix}{name.replace('_norm.scale', f'_norm.{leaf}')}": value for name, value in stored.items()}
    ours: dict[str, list[torch.Tensor]] = {}
    for name, held in FLUX.held(parts, "diffusers").items():
        windows = [parts[part].stored for part in held]
        ours[name] = [by_tensor[one.tensor][one.row : one.row + one.rows] for one in windows]
    assert ours.keys() == converted.keys()
    for name, rows in ours.items():
        assert sum(map(len, rows)) == len(converted[name]), name
        assert torch.equal(
            torch.cat([one.reshape(len(one), -1)[:, 0] for one in rows]),
            converted[name].reshape(len(converted[name]), -1)[:, 0],
        ), name


def test_both_layouts_have_the_same_parts_and_are_written_back_under_their_own_names() -> None:
    found = {layout: recognise(table(FLUX.shapes(DEV, layout)), source="f") for layout in FLUX.layouts}
    shapes = [{name: part.shape for name, part in anatomy.parts.items()} for anatomy in found.values()]
    assert shapes[0] == shapes[1]
    for layout, anatomy in found.items():
        assert (anatomy.family, anatomy.layout) == (FLUX, layout)
        assert dict(anatomy.outputs(layout)) == anatomy.stored_parts()
        assert {tensor for tensor, _ in anatomy.outputs(layout)} == set(FLUX.shapes(DEV, layout))


def test_linear1_is_q_k_v_and_the_feed_forward() -> None:
    parts = recognise(table(FLUX.shapes(DEV, "comfyui")), source="f").parts
    for leaf in ("weight", "bias"):
        names = [*(f"attn.to_{letter}" for letter in "qkv"), "proj_mlp"]
        windows = [parts[f"single_transformer_blocks.7.{name}.{leaf}"].stored for name in names]
        assert [(w.tensor, w.row, w.rows) for w in windows] == [
            (f"single_blocks.7.linear1.{leaf}", row, rows)
            for row, rows in ((0, 3072), (3072, 3072), (6144, 3072), (9216, 12288))
        ]


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_the_final_modulation_has_its_halves_in_the_other_order(leaf: str) -> None:
    for layout, tensor, order in (
        ("comfyui", "final_layer.adaLN_modulation.1", ("shift", "scale")),
        ("diffusers", "norm_out.linear", ("scale", "shift")),
    ):
        parts = recognise(table(FLUX.shapes(DEV, layout)), source="f").parts
        windows = [parts[f"norm_out.linear.{half}.{leaf}"].stored for half in order]
        assert [(w.tensor, w.row, w.rows) for w in windows] == [(f"{tensor}.{leaf}", row, 3072) for row in (0, 3072)]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"controlnet_x_embedder.weight": (3072, 64)}, "a ControlNet"),
        ({"double_blocks.0.img_mlp.gate_proj.weight": (12288, 3072)}, "Ovis"),
        ({"vector_in.in_layer.weight": None}, "Chroma, Flux.2 or LongCat"),
    ],
)
def test_relatives_are_not_flux(change: dict[str, tuple[int, ...] | None], name: str) -> None:
    shapes = FLUX.shapes(ONE, "comfyui") | {key: shape for key, shape in change.items() if shape is not None}
    shapes = {key: shape for key, shape in shapes.items() if key not in change or change[key] is not None}
    assert recognise(table(shapes), source=name).family is GENERIC


def test_a_linear1_that_cannot_be_split_is_refused() -> None:
    shapes = {**FLUX.shapes(ONE, "comfyui"), "single_blocks.0.linear1.weight": (9216, 3072)}
    with pytest.raises(
        FamilyError, match=r"linear1.weight.*q, k, v and proj_mlp: wanted 3072 rows of q, .* and 12288 rows of proj_mlp"
    ):
        recognise(table(shapes), source="f")


@pytest.mark.parametrize("missing", ["norm_out.linear.scale.weight", "single_transformer_blocks.0.proj_mlp.weight"])
def test_an_incomplete_fused_tensor_is_refused(missing: str) -> None:
    parts = set(recognise(table(FLUX.shapes(ONE, "diffusers")), source="f").parts) - {missing}
    with pytest.raises(FamilyError, match=f'"{missing}" is missing'):
        FLUX.outputs(parts, "comfyui")


@pytest.mark.parametrize(
    ("group", "parts", "parameters"),
    [
        ("double", 19 * 32, 19 * 339_831_296),
        ("single", 38 * 14, 38 * 141_591_808),
        ("modulation", 19 * 4 + 38 * 2 + 4, 19 * 2 * (6 * 3072) * 3073 + 38 * 3 * 3072 * 3073 + 2 * 3072 * 3073),
        ("q", (19 * 2 + 38) * 2, (19 * 2 + 38) * 3072 * 3073),
        ("norm", 19 * 4 + 38 * 2, (19 * 4 + 38 * 2) * 128),
    ],
)
def test_groups(group: str, parts: int, parameters: int) -> None:
    anatomy = recognise(table(FLUX.shapes(DEV, "comfyui")), source="f")
    members = [part for part in anatomy.parts.values() if group in FLUX.groups(part.name, part.shape)]
    assert (len(members), sum(part.numel for part in members)) == (parts, parameters)
    assert all(FLUX.groups(part.name, part.shape) for part in anatomy.parts.values())


@pytest.mark.parametrize("layout", FLUX.layouts)
@pytest.mark.parametrize("sizes", [DEV, SCHNELL, FILL], ids=["dev", "schnell", "Fill"])
def test_the_config_makes_a_model_of_the_same_shapes(sizes: dict[str, int], layout: str) -> None:
    config = FLUX.config(recognise(table(FLUX.shapes(sizes, layout)), source="f"))
    assert config is not None
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(
            {key: value for key, value in config.items() if key != "_class_name"}
        )
    assert FLUX.shapes(sizes, "diffusers") == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_every_name_that_comfyui_maps_means_the_same_rows(comfyui: ComfyUI) -> None:
    config = {
        "hidden_size": DEV["dim"],
        "depth": DEV["transformer_blocks"],
        "depth_single_blocks": DEV["single_transformer_blocks"],
    }
    names = comfyui.ask("diffusers_names", function="flux_to_diffusers", config=config)["names"]
    shapes = FLUX.shapes(DEV, "comfyui")
    anatomy = recognise(table(shapes), source="f")
    for name, held in FLUX.held(anatomy.parts, "diffusers").items():
        target, start, rows, swapped = names[name]
        windows = [anatomy.parts[part].stored for part in held]
        assert {in_comfyui(one.tensor) for one in windows} == {target}
        first, count = min(one.row for one in windows), sum(one.rows for one in windows)
        assert (first, count) == (start or 0, rows or shapes[windows[0].tensor][0])
        assert (windows[0].row > windows[-1].row) == swapped
