"""Selection patterns: what each form selects, and what is said when it selects nothing."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.arch import recognise, select
from mergetool.arch.families.z_image import reference_shapes
from mergetool.errors import PatternError
from tests.arch.tables import TINY, anatomy, table

DEEP = TINY | {"n_layers": 30, "n_refiner_layers": 2}
NAMES = reference_shapes(DEEP, "diffusers")
COMFYUI = anatomy(DEEP, "comfyui", "model.diffusion_model.")
DIFFUSERS = anatomy(DEEP, "diffusers")
Q, K, V = (f"layers.3.attention.to_{x}.weight" for x in "qkv")


def chosen(pattern: str) -> set[str]:
    """What the pattern selects: the same in both layouts."""
    comfyui, diffusers = select([pattern], COMFYUI)[pattern], select([pattern], DIFFUSERS)[pattern]
    assert comfyui == diffusers
    return set(comfyui)


def beginning(*prefixes: str) -> set[str]:
    return {name for name in NAMES if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("refiner", beginning("noise_refiner.", "context_refiner.")),
        ("layers", beginning("layers.")),
        ("layers.1", beginning("layers.1.")),
        ("layers.0-9", beginning(*(f"layers.{n}." for n in range(10)))),
        ("layers.29", beginning("layers.29.")),
        ("layers.7-7", beginning("layers.7.")),
        ("noise_refiner.1", beginning("noise_refiner.1.")),
        ("cap_embedder.1", {"cap_embedder.1.weight", "cap_embedder.1.bias"}),
        ("layers.1.*", beginning("layers.1.")),
        ("layers.1?.*", beginning(*(f"layers.{n}." for n in range(10, 20)))),
        ("layers.[12].attention.to_q.weight", {"layers.1.attention.to_q.weight", "layers.2.attention.to_q.weight"}),
        (Q, {Q}),
        ("layers.3.attention", beginning("layers.3.attention.")),
        ("x_embedder", beginning("all_x_embedder.")),
        ("layers.*.attention", {n for n in beginning("layers.") if ".attention." in n}),
        ("layers.1-2.attention", beginning("layers.1.attention.", "layers.2.attention.")),
        ("layers.3-3.attention.to_?", {Q, K, V}),
        ("layers.3.attention.q", {Q}),
        ("layers.*.attention.q", {n for n in beginning("layers.") if ".to_q." in n}),
        ("layers.q", {n for n in beginning("layers.") if ".to_q." in n}),
        ("refiner.v", {n for n in beginning("noise_refiner.", "context_refiner.") if ".to_v." in n}),
        ("layers.1-2.ffn", beginning("layers.1.feed_forward.", "layers.2.feed_forward.")),
        ("layers.3.attention.qkv.weight", {Q, K, V}),
        ("*.3.attention.qkv.*", {Q, K, V}),
        ("layers.3.attention.out.weight", {"layers.3.attention.to_out.0.weight"}),
        ("x_embedder.*", beginning("all_x_embedder.")),
        ("final_layer.*", beginning("all_final_layer.")),
        ("all_final_layer.2-1.linear.*", beginning("all_final_layer.2-1.linear.")),
        ("x_pad_token", {"x_pad_token"}),
        ("*_pad_token", {"x_pad_token", "cap_pad_token"}),
        (r"re:layers\.(3|4)\.attention\.to_[qk]\.weight", {n.replace(".3", f".{b}") for n in (Q, K) for b in (3, 4)}),
        (r"re:.*attention\.qkv.*", {n for n in NAMES if ".to_q." in n or ".to_k." in n or ".to_v." in n}),
    ],
)
def test_forms(pattern: str, expected: set[str]) -> None:
    assert expected
    assert chosen(pattern) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.diffusion_model.layers.3.attention.qkv.weight", {Q, K, V}),
        ("model.diffusion_model.layers.0-1", beginning("layers.0.", "layers.1.")),
        ("model.diffusion_model.*", set(NAMES)),
        (r"re:model\..*\.3\.attention\.qkv\.weight", {Q, K, V}),
    ],
)
def test_stored_names_with_their_prefix_work(pattern: str, expected: set[str]) -> None:
    assert set(select([pattern], COMFYUI)[pattern]) == expected


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 29), st.integers(0, 29))
def test_a_range_is_its_blocks_both_ends_included(a: int, b: int) -> None:
    first, last = sorted((a, b))
    each = select([f"layers.{n}" for n in range(first, last + 1)], DIFFUSERS)
    assert chosen(f"layers.{first}-{last}") == set().union(*each.values())


def test_patterns_keep_their_order_and_their_own_parts() -> None:
    found = select(["pad", "layers.1", "pad"], DIFFUSERS)
    assert list(found) == ["pad", "layers.1"]
    assert found["pad"] == {"x_pad_token", "cap_pad_token"}


def test_any_numbered_stack_of_an_unknown_model_has_ranges() -> None:
    others = {"core.blocks_1.mlp.weight": (2, 2), "core.blocks.x.1.weight": (2, 2)}
    model = recognise(table(others | {f"core.blocks.{n}.mlp.weight": (2, 2) for n in range(12)}), source="f")
    assert set(select(["core.blocks.1-2"], model)["core.blocks.1-2"]) == {
        "core.blocks.1.mlp.weight",
        "core.blocks.2.mlp.weight",
    }


def refusal(pattern: str) -> str:
    with pytest.raises(PatternError) as caught:
        select([pattern], DIFFUSERS)
    return str(caught.value)


@pytest.mark.parametrize(
    "pattern", ["layers.30", "layers.29-30", "layers.0-999999999", "layers.0-999999999.attention", "layers.30.q"]
)
def test_a_range_past_the_end_says_how_many_blocks_there_are(pattern: str) -> None:
    message = refusal(pattern)
    assert f'"{".".join(pattern.split(".")[:2])}"' in message
    assert "30 blocks" in message
    assert '"layers.0-29"' in message


def test_a_backward_range_is_turned_round_in_the_message() -> None:
    assert '"layers.2-9"' in refusal("layers.9-2")


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("refiners", "refiner"),
        ("atention", "attention"),
        ("layers.3.attention.to_q.weigth", "layers.3.attention.to_q.weight"),
    ],
)
def test_a_near_miss_is_suggested(pattern: str, nearest: str) -> None:
    assert f'did you mean "{nearest}"?' in refusal(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "zzz",
        "re:zzz",
        "LAYERS",
        "attention.*",
        "re:refiner",
        "layers.",
        "layers.1-",
        "re:",
        " refiner",
        "layers.0-9.atention",
        "layers.q.q.x",
        "q.",
        ".q",
    ],
)
def test_nothing_matched_lists_the_groups(pattern: str) -> None:
    message = refusal(pattern)
    assert "refiner, noise_refiner, context_refiner, layers, attention, q, k, v, out, ffn, adaln" in message
    assert "layers.0-29" in message


def test_a_group_the_file_has_nothing_of_is_said_so() -> None:
    assert "a group it has nothing in" in refusal("siglip")


def test_empty_and_overlong_patterns_are_refused() -> None:
    assert "empty" in refusal("")
    assert "501 characters" in refusal("x" * 501)
    assert "matches no tensor" in refusal("x" * 500)


@pytest.mark.parametrize("pattern", ["*a" * 250, "[" * 500, "?" * 500, "*" * 499 + "x", "[!a-" * 125])
def test_hostile_globs_end(pattern: str) -> None:
    assert "matches no tensor" in refusal(pattern)


def test_hostile_patterns_do_not_reach_the_terminal() -> None:
    assert "\x1b" not in refusal("\x1b[2J")
