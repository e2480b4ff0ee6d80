"""A recipe's text becomes plain values, each with its place; what looks like a value to YAML 1.1 alone is text."""

from __future__ import annotations

from decimal import Decimal

import pytest
import yaml

from mergetool.recipe import document
from mergetool.recipe.document import Node


def tree(text: str) -> Node:
    return document.parse(text.encode(), "r.yaml")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("5", 5),
        ("-5", -5),
        ("+7", 7),
        ("0.1", Decimal("0.1")),
        (".5", Decimal("0.5")),
        ("1e-3", Decimal("0.001")),
        ("171.1", Decimal("171.1")),
        ("010", 10),  # 8 in YAML 1.1
        ("true", True),
        ("null", None),
        ("~", None),
        ("yes", "yes"),  # true in YAML 1.1
        ("off", "off"),
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("0x10", "0x10"),  # 16 in YAML 1.1
        ("1_000", "1_000"),  # 1000 in YAML 1.1
        (".inf", ".inf"),
        ("2026-01-01", "2026-01-01"),  # a date in YAML 1.1
        ("'5'", "5"),
        ('"true"', "true"),
        ("layers.0-9", "layers.0-9"),
        ("[1, [2, x]]", [1, [2, "x"]]),
        ("{a: 1, b: {c: x}}", {"a": 1, "b": {"c": "x"}}),
    ],
)
def test_values_are_what_they_look_like(written: str, value: object) -> None:
    found = tree(f"key: {written}").data()
    assert found == {"key": value}
    assert type(found["key"]) is type(value)  # type: ignore[index]


def test_texts_are_what_pyyaml_reads() -> None:
    text = "a: >\n  one\n  two\n\n  three\nb: |\n  x\n   y\nc: 'it''s'\nd: \"a\\u00e9\"\ne: plain\n  goes on\n? f\n: - x\n  - y\n"
    assert tree(text).data() == yaml.safe_load(text)


def test_an_alias_is_the_value_of_its_anchor() -> None:
    assert tree("a: &p [refiner, pad]\nb: *p\n").data() == {"a": ["refiner", "pad"], "b": ["refiner", "pad"]}


def test_what_aliases_repeat_counts_as_often_as_it_is_repeated() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 8)]  # 9^8 values
    with pytest.raises(document.RecipeError, match=r"r\.yaml:[4-7]:.*(10000 values|aliases)"):
        tree("\n".join(lines))


@pytest.mark.parametrize(
    "text",
    [
        "merge: alpha + beta",
        "merge: 'alpha + beta'",
        'merge: "alpha + beta"',
        "merge: >\n  alpha\n  + beta\n",
        "merge: |-\n  alpha\n  + beta\n",
        "merge: alpha\n   +\n   beta\n",
        "merge: '''alpha'' + beta'",
        "a: 1\r\nmerge: >-\r\n  alpha +\r\n  beta\r\n",
    ],
)
def test_every_character_of_a_text_has_its_place_in_the_file(text: str) -> None:
    node = tree(text).value["merge"]  # type: ignore[call-overload,index]
    place = node.place_of(node.value.index("beta"))
    line = text.replace("\r", "").split("\n")[place.line - 1]
    assert line[place.column - 1 :].startswith("beta")


def test_values_and_keys_know_where_they_stand() -> None:
    root = tree("models:\n  a: x.safetensors\nset: {refiner: 0}\n")
    assert str(root.keys["set"]) == "r.yaml:3:1"
    assert str(root.value["set"].keys["refiner"]) == "r.yaml:3:7"  # type: ignore[call-overload,index]
    assert str(root.value["models"].value["a"].at) == "r.yaml:2:6"  # type: ignore[call-overload,index]


def test_a_byte_order_mark_is_no_part_of_the_text() -> None:
    assert document.parse(b"\xef\xbb\xbfmerge: a", "r.yaml").data() == {"merge": "a"}
