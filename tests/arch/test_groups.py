"""What the groups of Z-Image hold, and the sizes `inspect` prints of them."""

from __future__ import annotations

import pytest

from mergetool.arch import describe, recognise
from mergetool.arch.families.z_image import reference_shapes
from tests.arch.tables import OMNI, TINY, anatomy, table


def members(group: str, config: dict[str, object] = TINY) -> set[str]:
    found = anatomy(config)
    return {name for name, part in found.parts.items() if group in found.family.groups(name, part.shape)}


def beginning(*prefixes: str, config: dict[str, object] = TINY) -> set[str]:
    return {name for name in reference_shapes(config, "diffusers") if name.startswith(prefixes)}


def ending(*suffixes: str) -> set[str]:
    return {name for name in reference_shapes(TINY, "diffusers") if name.endswith(suffixes)}


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        ("refiner", beginning("noise_refiner.", "context_refiner.")),
        ("noise_refiner", beginning("noise_refiner.")),
        ("context_refiner", beginning("context_refiner.")),
        ("layers", beginning("layers.")),
        ("q", ending(".to_q.weight")),
        ("k", ending(".to_k.weight")),
        ("v", ending(".to_v.weight")),
        ("out", ending(".to_out.0.weight")),
        ("ffn", ending(".w1.weight", ".w2.weight", ".w3.weight")),
        ("adaln", {name for name in ending(".weight", ".bias") if ".adaLN_modulation." in name}),
        ("embedder", beginning("all_x_embedder.", "t_embedder.", "cap_embedder.")),
        ("pad", {"x_pad_token", "cap_pad_token"}),
        ("final", beginning("all_final_layer.")),
        ("siglip", set()),
    ],
)
def test_members(group: str, expected: set[str]) -> None:
    assert members(group) == expected


def test_attention_is_the_whole_module_in_every_block() -> None:
    assert members("attention") == {n for n in reference_shapes(TINY, "diffusers") if ".attention." in n}


def test_head_norms_are_norms_and_not_projections() -> None:
    for name in ending(".norm_q.weight", ".norm_k.weight"):
        assert name in members("norm")
        assert name not in members("q") | members("k")


def test_every_one_dimensional_weight_of_z_image_is_a_norm() -> None:
    shapes = reference_shapes({}, "diffusers")
    assert members("norm", {}) == {n for n, shape in shapes.items() if len(shape) == 1 and n.endswith(".weight")}


def test_omni_refiner_is_siglip_and_not_refiner() -> None:
    config = TINY | {"siglip_feat_dim": 24}
    assert members("siglip", config) == beginning("siglip_", config=config)
    assert members("refiner", config) == beginning("noise_refiner.", "context_refiner.", config=config)
    assert members("pad", config) == {"x_pad_token", "cap_pad_token", "siglip_pad_token"}


@pytest.mark.parametrize("config", [{}, OMNI])
def test_every_part_is_in_a_group(config: dict[str, object]) -> None:
    found = anatomy(config)
    assert all(found.family.groups(name, part.shape) for name, part in found.parts.items())


def test_group_names_leave_out_what_the_file_has_not() -> None:
    plain, omni = anatomy({}), anatomy(OMNI)
    assert "siglip" not in plain.family.group_names(plain)
    assert set(omni.family.group_names(omni)) - set(plain.family.group_names(plain)) == {"siglip"}


@pytest.mark.parametrize(("layout", "tensors"), [("comfyui", 453), ("diffusers", 521)])
def test_description_of_the_real_size(layout: str, tensors: int) -> None:
    description = describe(anatomy({}, layout))
    total = description.total
    assert (total.tensors, total.parameters, total.nbytes) == (tensors, 6_154_908_736, 12_309_817_472)
    sizes = {group.name: group for group in description.groups}
    assert sizes["refiner"].parameters == 2 * 180_910_336 + 2 * 176_962_816
    assert sizes["layers"].parameters == 30 * 180_910_336
    assert sizes["q"].tensors == 34
    assert sizes["q"].parameters == 34 * 3840 * 3840
    assert sizes["attention"].tensors == (136 if layout == "comfyui" else 204)


def test_what_is_outside_does_not_count() -> None:
    tensors = table(reference_shapes(TINY, "comfyui") | {"vae.conv.weight": (100, 100)})
    assert describe(recognise(tensors, source="f")).total == describe(anatomy()).total
