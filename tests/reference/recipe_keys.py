"""docs/reference/recipe-keys.md and the schema beside it, from the models of recipes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.recipe import schema

HEAD = """\
# Keys of a recipe

Every key that a recipe file can have. [Recipes](recipes.md) explains them with examples; editors complete and check them with [recipe.schema.json](recipe.schema.json).

A recipe is one of three: several outputs, one merge, or one difference LoRA. In every text `{NAME}` stands for a variable's value, and `"{NAME}"` alone can stand for a number."""

SECTIONS: Mapping[str, str] = {
    "SeveralOutputs": "A recipe of several outputs",
    "OneMerge": "A recipe of one merge",
    "OneLora": "A recipe of one difference LoRA",
    "DiffSpec": "`diff`: what the LoRA is taken from",
    "PicturesSpec": "`verify`: the look at an output",
}

OTHERS: Mapping[str, str] = {
    "MergeOutput": "the keys of [a recipe of one merge](#a-recipe-of-one-merge) without `models`, `variables` and `sweep`",
    "LoraOutput": "the keys `diff` and `output` of [a recipe of one difference LoRA](#a-recipe-of-one-difference-lora)",
}

Node = Mapping[str, Any]


def schema_lines() -> list[str]:
    """The schema, as ``mergetool merge --schema`` prints it."""
    return json.dumps(schema.json_schema(), indent=2, ensure_ascii=False).splitlines()


def lines() -> Iterator[str]:
    """The page."""
    yield from HEAD.splitlines()
    kinds: Mapping[str, Node] = schema.json_schema()["$defs"]
    unknown = set(kinds) - set(SECTIONS) - set(OTHERS)
    if unknown:
        raise ValueError(f"no section says what {', '.join(sorted(unknown))} is")
    for name, title in SECTIONS.items():
        kind = kinds[name]
        yield from (
            "",
            f"## {title}",
            "",
            kind["description"],
            "",
            "| key | value | default | what it says |",
            "|---|---|---|---|",
        )
        for key, node in kind["properties"].items():
            default = "needed" if key in kind.get("required", ()) else _default(node.get("default"))
            yield f"| `{key}` | {_value(node)} | {default} | {_cell(node.get('description', ''))} |"


def _default(value: object) -> str:
    return "-" if value is None or value is False or value in ([], {}) else f"`{_cell(str(value))}`"


def _value(node: Node) -> str:
    """What a key takes, in words."""
    found: list[str] = []
    for one in _choices(node):
        word = _word(one)
        if word and word not in found:
            found.append(word)
    return ", ".join(found) or "text"


def _choices(node: Node) -> Iterator[Node]:
    for key in ("anyOf", "oneOf", "allOf"):
        for one in node.get(key, ()):
            yield from _choices(one)
        if key in node:
            return
    yield node


WORDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "names with values",
}


def _word(node: Node) -> str:
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return OTHERS.get(name) or f"[its keys]({_anchor(SECTIONS[name])})"
    if "enum" in node or "const" in node:
        return " ".join(f"`{word}`" for word in node.get("enum", [node.get("const")]))
    kind = node.get("type")
    if kind == "array":
        return f"list of {_value(node.get('items', {}))}"
    if kind == "object" and isinstance(node.get("additionalProperties"), Mapping):
        return f"names, each with {_value(node['additionalProperties'])}"
    if kind == "null" or node.get("pattern", "").startswith(r"^\{"):
        return ""  # a key may stand without a value, and every number may be a variable: the page's head says so
    return WORDS.get(str(kind), "")


def _anchor(title: str) -> str:
    return "#" + "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c == "-")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
