"""What stands before a model's own names: wrappers come off, of every family, and what lies beside the model is told apart."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch import recognise
from mergetool.arch.families.z_image import Z_IMAGE
from mergetool.arch.generic import GENERIC
from mergetool.arch.prefixes import check, is_known, read
from mergetool.errors import FamilyError, UsageError
from tests.arch.tables import table, z_image

PREFIXES = [
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "model.model.",
    "model.",
    "net.",
    "transformer.",
    "module.",
    "_orig_mod.",
    "pipe.dit.",
    "module._orig_mod.",
]
FLUX = (
    "img_in.weight",
    "double_blocks.0.img_attn.qkv.weight",
    "double_blocks.0.img_attn.qkv.bias",
    "final_layer.linear.weight",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_comes_off_every_family(prefix: str) -> None:
    found = recognise(table(dict.fromkeys(FLUX, (4, 4)), prefix=prefix), source="f")
    assert (found.family, found.prefix, set(found.parts)) == (GENERIC, prefix, set(FLUX))
    z = recognise(z_image(prefix=prefix), source="f")
    assert (z.family, z.prefix, len(z.parts)) == (Z_IMAGE, prefix, 73)


@given(
    st.permutations(["module.", "_orig_mod.", "model.", "transformer.", "net."]).flatmap(
        lambda all_: st.integers(0, 5).map(lambda n: "".join(all_[:n]))
    )
)
@settings(deadline=None, max_examples=60)
def test_wrappers_come_off_in_any_order(prefix: str) -> None:
    found = read([prefix + name for name in FLUX], source="f")
    assert (found.prefix, list(found.own.values()), found.outside) == (prefix, list(FLUX), ())


def test_a_wrapper_that_many_tensors_lack_is_a_module_of_an_unknown_model() -> None:
    inside, beside = [f"transformer.layers.{n}.q.weight" for n in range(6)], [f"to_embed.{n}.weight" for n in range(6)]
    for prefix in ("", "model.model."):
        found = recognise(table(dict.fromkeys([*inside, *beside], (4, 4)), prefix=prefix), source="f")
        assert (found.prefix, set(found.parts)) == (prefix, {*inside, *beside})
    stray = recognise(table(dict.fromkeys([*inside, "stray.weight"], (4, 4))), source="f")
    assert "layers.0.q.weight" in stray.parts
    z = recognise(z_image(prefix="transformer.") | table(dict.fromkeys(beside, (4, 4))), source="f")
    assert z.family is Z_IMAGE


def test_components_that_pytorch_puts_into_names_come_out() -> None:
    found = read(
        ["blocks.0._orig_mod.attn.to_q.weight", "blocks.1._checkpoint_wrapped_module.attn.to_q.weight"], source="f"
    )
    assert list(found.own.values()) == ["blocks.0.attn.to_q.weight", "blocks.1.attn.to_q.weight"]


def test_what_only_some_tensors_have_before_them_is_no_prefix_of_the_file() -> None:
    found = read(["model.layers.0.mlp.weight", "model.norm.weight", "lm_head.weight"], source="f")
    assert found.prefix == ""
    assert list(found.own.values()) == ["layers.0.mlp.weight", "norm.weight", "lm_head.weight"]


def test_a_bare_leaf_is_never_all_that_stays_of_a_name() -> None:
    assert list(read(["net.weight", "net.bias"], source="f").own.values()) == ["net.weight", "net.bias"]


def test_beside_more_than_five_names_under_net_comfyui_loads_nothing_else() -> None:
    names = [f"net.blocks.{n}.mlp.weight" for n in range(6)]
    assert read([*names, "logvar.0.freqs"], source="f").outside == ("logvar.0.freqs",)
    assert read([*names[:5], "logvar.0.freqs"], source="f").outside == ()


@pytest.mark.parametrize("second", ["", "diffusion_model.", "model."])
def test_a_model_under_two_prefixes_is_refused(second: str) -> None:
    first = [f"model.diffusion_model.{name}" for name in FLUX]
    for other in (FLUX, ("double_blocks.1.img_attn.qkv.weight",)):
        with pytest.raises(FamilyError, match=f'"model.diffusion_model." and "{second}"'):
            read([*first, *(second + name for name in other)], source="f")


def test_a_norm_is_one_part_under_either_spelling_of_its_weight() -> None:
    norm = "double_blocks.0.img_attn.norm.key_norm"
    spelled = [recognise(table({f"{norm}.{leaf}": (4,)}), source="f") for leaf in ("scale", "weight")]
    assert [set(found.parts) for found in spelled] == [{f"{norm}.weight"}] * 2
    assert [name for name, _ in spelled[0].outputs("plain")] == [f"{norm}.scale"]


def test_a_prefix_to_write_ends_in_a_dot() -> None:
    check("")
    check("model.")
    with pytest.raises(UsageError, match=r'write `prefix="net\."'):
        check("net")


def test_a_prefix_that_would_not_come_off_again_is_known_to_be_none() -> None:
    assert is_known("module.model.diffusion_model.")
    assert not is_known("mine.")
