"""Law: whatever parts come in, in whatever order, each leaves in exactly one tensor, and reading that back gives them.

Tensors are named by the layout and hold their parts in row order, so stored -> parts -> stored is the identity.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch import recognise
from mergetool.arch.families import FAMILIES
from mergetool.arch.families.z_image import Z_IMAGE, reference_shapes
from mergetool.arch.known import KnownFamily
from mergetool.errors import FamilyError, UsageError
from tests.arch.tables import TINY, anatomy, table

OMNI = TINY | {"siglip_feat_dim": 24, "n_layers": 12}
PARTS = [*reference_shapes(OMNI, "diffusers"), "norm_final.weight", "layers.0.novelty.weight", "novelty"]
FUSED = [f"layers.11.attention.to_{x}.weight" for x in "qkv"]


@settings(deadline=None, max_examples=50)
@given(st.permutations(PARTS).flatmap(lambda order: st.integers(0, len(order)).map(lambda n: order[:n])))
def test_diffusers_layout_covers_any_subset_once(parts: list[str]) -> None:
    outputs = Z_IMAGE.outputs(parts, "diffusers")
    assert sorted(outputs) == sorted((part, (part,)) for part in parts)
    assert outputs == Z_IMAGE.outputs(sorted(parts), "diffusers")


@settings(deadline=None, max_examples=50)
@given(st.permutations(PARTS), st.sets(st.sampled_from(sorted(reference_shapes(OMNI, "comfyui")))))
def test_comfyui_layout_round_trips_any_set_of_its_tensors(order: list[str], absent: set[str]) -> None:
    parts = [part for part in order if Z_IMAGE.stored_name(part, "comfyui") not in absent]
    outputs = Z_IMAGE.outputs(parts, "comfyui")
    assert sorted(part for _, names in outputs for part in names) == sorted(parts)
    assert len({tensor for tensor, _ in outputs}) == len(outputs)
    assert outputs == Z_IMAGE.outputs(sorted(parts), "comfyui")

    needed = {"cap_embedder.1.weight", "noise_refiner.0.attention.k_norm.weight"} | {
        name for name in reference_shapes(OMNI, "comfyui") if name.endswith(".out.weight")
    }
    if absent.isdisjoint(needed):
        shapes = reference_shapes(OMNI, "comfyui") | dict.fromkeys(
            ["norm_final.weight", "layers.0.novelty.weight"], (2,)
        )
        stored = table({tensor: shapes.get(tensor, (3,)) for tensor, _ in outputs})
        assert recognise(stored, source="f").stored_parts() == dict(outputs)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers"])
def test_a_file_is_written_back_under_its_own_names(layout: str) -> None:
    found = anatomy({}, layout)
    assert dict(Z_IMAGE.outputs(found.parts, layout)) == found.stored_parts()
    assert {tensor for tensor, _ in Z_IMAGE.outputs(found.parts, layout)} == set(reference_shapes({}, layout))


def test_canonical_order_is_that_of_the_forward_pass() -> None:
    sections = [tensor.split(".")[0] for tensor, _ in Z_IMAGE.outputs(PARTS, "comfyui")]
    assert list(dict.fromkeys(sections)) == [
        *("x_embedder", "t_embedder", "cap_embedder", "siglip_embedder"),
        *("x_pad_token", "cap_pad_token", "siglip_pad_token"),
        *("noise_refiner", "context_refiner", "siglip_refiner", "layers", "norm_final", "final_layer", "novelty"),
    ]
    blocks = [tensor.split(".")[1] for tensor, _ in Z_IMAGE.outputs(PARTS, "comfyui") if tensor.startswith("layers.")]
    assert list(dict.fromkeys(blocks)) == [str(n) for n in range(12)]


def test_q_k_and_v_are_fused_in_that_order() -> None:
    assert Z_IMAGE.outputs(reversed(FUSED), "comfyui") == [("layers.11.attention.qkv.weight", tuple(FUSED))]


@pytest.mark.parametrize("missing", range(3))
def test_an_incomplete_fused_tensor_is_refused(missing: int) -> None:
    parts = [part for i, part in enumerate(FUSED) if i != missing]
    with pytest.raises(FamilyError, match=f'"{FUSED[missing]}" is missing for "layers.11.attention.qkv.weight"'):
        Z_IMAGE.outputs(parts, "comfyui")
    assert len(Z_IMAGE.outputs(parts, "diffusers")) == 2


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(UsageError, match='no layout "plain"; choose comfyui or diffusers'):
        Z_IMAGE.outputs(FUSED, "plain")


def test_renames_compare_whole_components() -> None:
    """Each is a substring of a name that is renamed, or contains one."""
    for name in [
        "all_x_embedder.1-1.weight",
        "my_x_embedder.weight",
        "pre_final_layer.linear.weight",
        "cap.attention.out.weight",
    ]:
        assert Z_IMAGE.stored_name(name, "comfyui") == name
        [part] = set(recognise(table(reference_shapes(TINY, "comfyui") | {name: (2, 2)}), source="f").parts) - set(
            reference_shapes(TINY, "diffusers")
        )
        assert part == name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_no_size_is_measured_on_the_first_piece_of_a_fused_tensor(family: KnownFamily) -> None:
    """A header is measured as it is stored, where such a tensor goes by its first piece and has the rows of all."""
    places = [(name, layout) for name, axis in family.measures.values() if axis == 0 for layout in family.layouts]
    pieces = [(name, family.table.pieces(name, layout)) for name, layout in places if family.table.find(name)]
    assert not [name for name, fused in pieces if len(fused) > 1 and fused[0] == name]
