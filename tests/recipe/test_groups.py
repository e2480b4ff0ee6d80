"""Multipliers by group: their text, the values of gradients, and which part gets which."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergetool.arch import recognise
from mergetool.arch.families.z_image import reference_shapes
from mergetool.errors import PatternError, UsageError
from mergetool.options.multipliers import Gradient, parse_setting, setting_text
from mergetool.recipe.groups import expand, resolve
from tests.arch.tables import TINY, anatomy, table

DEEP = TINY | {"n_layers": 5, "n_refiner_layers": 2}
MODEL = anatomy(DEEP, "comfyui")
NAMES = set(reference_shapes(DEEP, "diffusers"))
NUMBERS = st.fractions(min_value=-1000, max_value=1000, max_denominator=10**6)


def scales(*settings: str) -> dict[str, Fraction]:
    return resolve([parse_setting(text) for text in settings], MODEL)


def by_block(found: dict[str, Fraction], ending: str, stack: str = "layers") -> list[float]:
    blocks = range(5)
    return [float(found[name]) for n in blocks if (name := f"{stack}.{n}.{ending}") in found]


@pytest.mark.parametrize(
    ("text", "pattern", "value"),
    [
        ("refiner=0", "refiner", Fraction(0)),
        ("layers.0-9 = 0.5", "layers.0-9", Fraction(1, 2)),
        ("layers.*.attention=-171.1", "layers.*.attention", Fraction(-1711, 10)),
        ("re:a=b=1e3", "re:a=b", Fraction(1000)),
        ("ffn=1/3", "ffn", Fraction(1, 3)),
        ("layers=linear(0.2, 1.0)", "layers", Gradient("linear", Fraction(1, 5), Fraction(1))),
        ("layers=bell( 0 ,-20)", "layers", Gradient("bell", Fraction(0), Fraction(-20))),
        ("preset:late-layers", "preset:late-layers", Fraction(1)),
        ("preset:late-layers=20", "preset:late-layers", Fraction(20)),
    ],
)
def test_what_a_setting_says(text: str, pattern: str, value: object) -> None:
    assert parse_setting(text) == (pattern, value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "layers", "=1", "layers=", "layers=nan", "layers=inf", "layers=1e39", "layers=1/0", "layers=0x10"),
        *("layers=1_0", "layers=" + "1" * 401, "layers=1e-999999999", "preset:late-layers=linear(0,1)"),
        *("layers=cubic(0,1)", "layers=LINEAR(0,1)", "layers=linear(0)", "layers=linear(0,1,2)", "layers=linear(0,x)"),
        "layers=linear(0,1",
    ],
)
def test_a_malformed_setting_shows_how_one_looks(text: str) -> None:
    with pytest.raises(UsageError, match=r"refiner=0.*layers=linear\(0\.2,1\)"):
        parse_setting(text)


@given(NUMBERS, NUMBERS, st.sampled_from(["linear", "smooth", "bell"]))
def test_text_reads_back_to_the_exact_setting(first: Fraction, last: Fraction, shape: str) -> None:
    for setting in (("ffn", first), ("layers", Gradient(shape, first, last))):
        assert parse_setting(setting_text(setting)) == setting


@pytest.mark.parametrize(
    ("shape", "values"),  # worked out by hand from the formulas in docs/reference/groups.md
    [
        ("linear", [0.2, 0.4, 0.6, 0.8, 1.0]),
        ("smooth", [0.2, 0.325, 0.6, 0.875, 1.0]),
        ("bell", [0.2, 0.6, 1.0, 0.6, 0.2]),
    ],
)
def test_values_over_five_blocks(shape: str, values: list[float]) -> None:
    assert by_block(scales(f"layers={shape}(0.2,1)"), "feed_forward.w1.weight") == values


def test_a_gradient_counts_from_the_first_to_the_last_selected_block() -> None:
    found = scales("layers.1-3=linear(0,1)")
    assert by_block(found, "attention.to_q.weight") == [0, 0.5, 1]
    assert {name.split(".")[1] for name in found} == {"1", "2", "3"}


def test_a_gap_between_blocks_keeps_its_width() -> None:
    found = scales("layers.[034].ffn=linear(0,1)")
    assert by_block(found, "feed_forward.w2.weight") == [0, 0.75, 1]


def test_a_gradient_reaches_only_what_its_pattern_selects() -> None:
    found = scales("layers.*.attention.q=bell(0,1)")
    assert set(found) == {f"layers.{n}.attention.to_q.weight" for n in range(5)}
    assert by_block(found, "attention.to_q.weight") == [0, 0.5, 1, 0.5, 0]


def test_a_later_setting_wins_part_by_part() -> None:
    found = scales("layers=linear(0,1)", "layers.2.attention=7", "v=0")
    assert found["layers.2.attention.to_q.weight"] == 7
    assert found["layers.2.attention.to_v.weight"] == 0
    assert found["layers.2.feed_forward.w1.weight"] == Fraction(1, 2)


def test_any_numbered_stack_of_an_unknown_model_has_depth() -> None:
    model = recognise(table({f"core.blocks.{n}.mlp.weight": (2, 2) for n in range(12)}), source="f")
    found = resolve([parse_setting("core.blocks.*=linear(0,11)")], model)
    assert found == {f"core.blocks.{n}.mlp.weight": n for n in range(12)}


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("attention", "context_refiner, layers, noise_refiner"),
        ("*", "is in none"),
        ("embedder", "is in none"),
        ("layers.3", r"only layers\.3 is selected"),
    ],
)
def test_a_gradient_over_anything_but_blocks_of_one_stack_is_refused(pattern: str, words: str) -> None:
    with pytest.raises(PatternError, match=words):
        scales(f"{pattern}=linear(0,1)")


def test_every_preset_is_exactly_its_groups() -> None:
    layers = {n for n in NAMES if n.startswith("layers.")}
    attention = {n for n in layers if ".attention." in n}
    ffn = {n for n in layers if ".feed_forward." in n}
    depth = {n: Fraction(int(n.split(".")[1]), 4) for n in layers}
    expected = {
        "refiners-kept": {n: 0 for n in NAMES if n.startswith(("noise_refiner.", "context_refiner."))},
        "layers-only": {n: int(n in layers) for n in NAMES},
        "attention-only": {n: int(n in attention) for n in NAMES},
        "ffn-only": {n: int(n in ffn) for n in NAMES},
        "early-layers": dict.fromkeys(NAMES, 0) | {n: 1 - x for n, x in depth.items()},
        "late-layers": dict.fromkeys(NAMES, 0) | depth,
    }
    assert {preset.name: scales(f"preset:{preset.name}") for preset in MODEL.family.presets} == expected


def test_a_presets_multiplier_scales_its_own() -> None:
    settings = expand([parse_setting("preset:late-layers=20")], MODEL.family)
    assert [setting_text(setting) for setting in settings] == ["*=0", "layers=linear(0,20)"]


def test_an_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"did you mean preset:late-layers.*attention-only: \*=0, layers\.attention=1"):
        scales("preset:late-layer")


def test_a_family_without_presets_says_so() -> None:
    model = recognise(table({"a.0.weight": (2, 2)}), source="f")
    with pytest.raises(UsageError, match="has no presets"):
        resolve([parse_setting("preset:late-layers")], model)
