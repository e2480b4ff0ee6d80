"""An architecture nobody taught mergetool: names as they are, groups read off names and shapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch import Anatomy, describe, recognise
from mergetool.arch.generic import GENERIC
from mergetool.checkpoint.dtypes import BF16, BY_CODE
from mergetool.checkpoint.header import Header
from mergetool.errors import UsageError
from tests.arch.tables import table

FLUX = {
    "img_in.weight": (8, 4),
    "img_in.bias": (8,),
    "double_blocks.0.img_attn.qkv.weight": (24, 8),
    "double_blocks.0.img_attn.norm.key_norm.weight": (4,),
    "double_blocks.10.img_mlp.0.weight": (32, 8),
    "double_blocks.2.txt_mlp.0.bias": (32,),
    "norm.weight": (8,),
    "logit_scale": (),
    "img_in.scale": (),
    "conv.weight": (8, 4, 3, 3),
}


def flux() -> Anatomy:
    return recognise(table(FLUX), source="f")


def test_every_tensor_is_a_part_under_its_own_name() -> None:
    found = flux()
    assert (found.family, found.layout, found.prefix) == (GENERIC, "plain", "")
    assert {name: part.shape for name, part in found.parts.items()} == FLUX
    assert all((part.stored.tensor, part.stored.row) == (name, 0) for name, part in found.parts.items())
    assert found.parts["conv.weight"].stored.rows == 8
    assert found.parts["logit_scale"].stored.rows == 1


@pytest.mark.parametrize(
    ("part", "groups"),
    [
        ("blocks.0.cross_attn.q.weight", {"attention"}),
        ("blocks.0.mlp_x.w1.weight", {"ffn"}),
        ("double.3.block.ff_i.experts.2.w1.weight", {"ffn"}),
        ("layers.0.img_feed_forward.linear_1.weight", {"ffn"}),
        ("t_embedder.mlp.0.weight", {"embedder"}),
        ("img_emb.proj.1.weight", {"embedder"}),
        ("noise_refiner.0.attention.to_q.weight", {"refiner", "attention"}),
        ("blocks.0.adaln_modulation_self_attn.1.weight", {"modulation"}),
        ("double_layers.0.modX.1.weight", {"modulation"}),
        ("blocks.0.img_mod.lin.weight", {"modulation"}),
        ("language_model.layers.0.q.weight", set()),
        ("blocks.0.modern.weight", set()),
    ],
)
def test_words_of_components_give_groups(part: str, groups: set[str]) -> None:
    """They are words, not beginnings: ``model`` is no modulation."""
    top = {part.split(".")[0], "matrix"}
    assert GENERIC.groups(part, (64, 64)) == groups | top


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("double_blocks", {name for name in FLUX if name.startswith("double_blocks.")}),
        ("img_in", {"img_in.weight", "img_in.bias", "img_in.scale"}),
        ("norm", {"norm.weight", "double_blocks.0.img_attn.norm.key_norm.weight"}),
        ("bias", {"img_in.bias", "double_blocks.2.txt_mlp.0.bias"}),
        ("matrix", {name for name, shape in FLUX.items() if len(shape) > 1}),
        ("attention", {name for name in FLUX if ".img_attn." in name}),
        ("ffn", {name for name in FLUX if "_mlp." in name}),
    ],
)
def test_groups(group: str, expected: set[str]) -> None:
    assert {name for name, shape in FLUX.items() if group in GENERIC.groups(name, shape)} == expected


def test_group_names_are_the_derived_ones_and_then_the_components() -> None:
    found = flux()
    assert GENERIC.group_names(found) == (
        *("matrix", "norm", "bias", "attention", "ffn"),
        *("conv", "double_blocks", "img_in"),
    )


def test_outputs_are_in_natural_order() -> None:
    blocks = [name for name, _ in GENERIC.outputs(FLUX, "plain") if name.startswith("double_blocks.")]
    assert [name.split(".")[1] for name in blocks] == ["0", "0", "2", "10"]
    with pytest.raises(UsageError, match='no layout "comfyui"'):
        GENERIC.outputs(FLUX, "comfyui")


@settings(deadline=None, max_examples=100)
@given(st.lists(st.text(st.sampled_from("a.019"), max_size=8), unique=True))
def test_outputs_take_any_names_in_any_order(names: list[str]) -> None:
    outputs = GENERIC.outputs(names, "plain")
    assert sorted(outputs) == sorted((name, (name,)) for name in names)
    assert outputs == GENERIC.outputs(reversed(names), "plain")


def test_a_number_of_any_length_sorts() -> None:
    names = ["b." + "9" * 5000, "b." + "1" * 5001, "b.3"]
    assert [name for name, _ in GENERIC.outputs(names, "plain")] == ["b.3", names[0], names[1]]


def test_sub_byte_elements_count_whole_bytes() -> None:
    tensors = Header.plan([("a.weight", BY_CODE["F4"], (3, 2)), ("b.weight", BF16, (3,))]).tensors
    assert describe(recognise(tensors, source="f")).total.nbytes == 3 + 6


def test_scales_are_beside_the_weights() -> None:
    found = recognise(table(FLUX | {"img_in.weight_scale": ()}), source="f")
    assert found.sides == ("img_in.weight_scale",)
