"""Check nodes of a recipe against the schema.

The result is the model they fill, or one sentence with the place of the error.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mergetool.checkpoint.names import quoted
from mergetool.errors import RecipeError
from mergetool.options.table import named, spelled
from mergetool.recipe.document import Node, Place

M = TypeVar("M", bound=BaseModel)

_WANTED = {
    "string_type": "a text",
    "int_type": "a whole number",
    "is_instance_of": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def validated(kind: type[M], node: Node, also: Sequence[str] = ()) -> M:
    """``node``, a mapping, as a ``kind``; ``also`` are keys that may stand beside it.

    Raises RecipeError, for the error that stands first in the file.
    """
    try:
        return kind.model_validate(node.data())
    except ValidationError as error:
        raise _first(error, node, kind, also) from None


def as_keys(sentence: str) -> str:
    """Replace the options in ``sentence`` by the recipe's keys, where there are such."""

    def key(name: str, value: str | None) -> str | None:
        row = named(name)
        if row is None or "recipe" in row.option.missing:
            return None
        return f'"{row.key}: {value}"' if value else f'"{row.key}"'

    return spelled(sentence, key)


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean "..."`` with the nearest known name, or a list when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {quoted(near[0])}?"
    if not names:
        return "."
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return f"; there {'is' if len(names) == 1 else 'are'} {', '.join(names[:12])}{more}."


def keys_of(kind: type[BaseModel]) -> list[str]:
    """The keys that a mapping of this kind may have, as they are written."""
    return [field.alias or name for name, field in kind.model_fields.items()]


def _first(error: ValidationError, node: Node, kind: type[BaseModel], also: Sequence[str]) -> RecipeError:
    details: dict[tuple[str | int, ...], list[Mapping[str, Any]]] = {}
    for detail in error.errors(include_url=False, include_input=False):
        path = _path(detail["loc"], node, extra=detail["type"] in ("extra_forbidden", "missing"))
        details.setdefault(path, []).append(detail)
    # Of a union every branch complains: the one that the value was meant for is the one that got furthest into it.
    deepest = [path for path in details if not any(len(p) > len(path) and p[: len(path)] == path for p in details)]
    places = {path: _place(path, node, details[path]) for path in deepest}
    path = min(deepest, key=lambda path: (places[path].line, places[path].column))
    return places[path].error(_sentence(path, node, details[path], kind, also))


def _path(loc: Sequence[str | int], node: Node, *, extra: bool) -> tuple[str | int, ...]:
    """``loc`` without the names of union branches and of constraints, which pydantic puts between keys."""
    path: list[str | int] = []
    for step in loc:
        inner = _inner(node, step)
        if inner is not None:
            node = inner
            path.append(step)
    if extra and loc and (not path or path[-1] != loc[-1]):
        path.append(loc[-1])
    return tuple(path)


def _place(path: Sequence[str | int], node: Node, details: Sequence[Mapping[str, Any]]) -> Place:
    at = node.at
    kind = details[0]["type"]
    is_key = details[0]["loc"][-1] == "[key]" or kind == "extra_forbidden"
    for i, step in enumerate(path):
        inner = _inner(node, step)
        if inner is None:
            break
        at = node.keys[str(step)] if is_key and i == len(path) - 1 else inner.at
        node = inner
    return at


def _inner(node: Node, step: str | int) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(str(step))
    if isinstance(node.value, list) and isinstance(step, int) and step < len(node.value):
        return node.value[step]
    return None


def _value(path: Sequence[str | int], node: Node) -> Node | None:
    for step in path:
        inner = _inner(node, step)
        if inner is None:
            return None
        node = inner
    return node


def _sentence(
    path: Sequence[str | int],
    node: Node,
    details: Sequence[Mapping[str, Any]],
    kind: type[BaseModel],
    also: Sequence[str],
) -> str:
    names = [step for step in path if isinstance(step, str)]
    name = quoted(names[-1]) if names else "the recipe"
    first = details[0]
    if first["type"] == "option":
        return as_keys(first["ctx"]["sentence"])
    if first["type"] == "extra_forbidden":
        return (
            f"there is no key {name} here{nearest(names[-1], [*_known(path, kind), *(also if len(path) == 1 else ())])}"
        )
    if first["type"] == "missing":
        return f"the key {name} is missing here."
    if first["loc"][-1] == "[key]":
        return f"{name} cannot be a name; use letters, digits and _, starting with a letter."
    value = _value(path, node)
    shown = _shown(value)
    # A value of the right type that breaks a rule: what other types could stand here does not matter.
    broken = [detail for detail in details if detail["type"] not in _WANTED and detail["type"] != "literal_error"]
    wanted = list(dict.fromkeys(filter(None, map(_wanted, broken or details))))
    if not wanted:
        return f"{name} is {shown}: {first['msg'].lower()}."
    if isinstance(value, Node) and isinstance(value.value, str):
        options = [option for detail in details for option in _literals(detail)]
        if options:
            return f"{name} is {shown}, which is not one of them{nearest(value.value, options)}"
    if {"a whole number", "a number"} <= set(wanted):
        wanted.remove("a whole number")
    return f"{name} is {shown}, but has to be {' or '.join(wanted)}."


def _wanted(detail: Mapping[str, Any]) -> str:
    context = detail.get("ctx", {})
    match detail["type"]:
        case "literal_error":
            return f"one of {', '.join(_literals(detail))}"
        case "greater_than_equal":
            return f"at least {context['ge']}"
        case "greater_than":
            return f"above {context['gt']}"
        case "less_than_equal" | "less_than":
            return f"at most {context.get('le', context.get('lt'))}"
        case "too_short" if context.get("min_length", 0) > 1:
            return f"{context['min_length']} values"
        case "too_short" | "string_too_short":
            return "more than nothing"
        case "too_long" | "string_too_long":
            return f"at most {context['max_length']} long"
        case known:
            return _WANTED.get(known, "")


def _literals(detail: Mapping[str, Any]) -> list[str]:
    if detail["type"] != "literal_error":
        return []
    return [part.strip("' ") for part in detail["ctx"]["expected"].replace(" or ", ", ").split(", ")]


def _shown(node: Node | None) -> str:
    if node is None:
        return "missing"
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return f"a list of {len(node.value)}"
    return quoted(node.value) if isinstance(node.value, str) else (node.typed or "empty")


def _known(path: Sequence[str | int], kind: type[BaseModel]) -> Collection[str]:
    """The keys of the model that the last step of ``path`` is a key of."""
    for step in path[:-1]:
        for name, field in kind.model_fields.items():
            if step == (field.alias or name):
                inner = _models_in(field.annotation)
                if inner:
                    kind = inner[0]
    return keys_of(kind)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]
