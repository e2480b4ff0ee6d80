"""The model and the writer of a LoRA file, as far as names, shapes and header tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

from mergetool.adapters.keys import Modules, Spelled, is_of_text_encoder
from mergetool.arch.anatomy import Family, Lookalike
from mergetool.arch.families import FAMILIES
from mergetool.arch.known import KnownFamily

_STATES_ORIGIN = ("ss_network_module", "ss_base_model_version", "modelspec.architecture")


def families_of(
    spelled: Mapping[str, Spelled],
    shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    among: Sequence[KnownFamily] = FAMILIES,
    *,
    signs: bool = True,
) -> list[tuple[Family, list[str]]]:
    """The families ``among`` these of most modules of ``spelled``, and their parts.

    That of most stands first, and of several of as many the one whose own names they are.

    Parts are as deep as the modules need them. ``shapes`` tell families whose names others have too by their widths.
    """
    of_model = [one for key, one in spelled.items() if not is_of_text_encoder(key)]
    depth = max((_depth(one) for one in of_model), default=0)
    widths = {shape[1] for key, shape in shapes.items() if len(shape) > 1 and _is_down(spelled.get(key))}
    found: list[tuple[int, int, Family, list[str]]] = []
    for family in among:
        named = any(_shows(sign, of_model) for sign in family.lora_signs)
        if signs and family.lora_signs and not named and widths.isdisjoint(family.lora_widths):
            continue
        parts = family.parts_to_depth(depth + 1, [one.module for one in of_model])
        modules = Modules(family, parts)
        known = sum(bool(modules.find(one)) for one in of_model)
        if known * 2 > len(of_model):
            others = {name.replace(".", "_") for name in family.aliases(parts)}
            found.append((known, -sum(one.module.replace(".", "_") in others for one in of_model), family, parts))
    return [(family, parts) for _, _, family, parts in sorted(found, key=lambda one: one[:2], reverse=True)]


def _shows(sign: str | tuple[str, ...], of_model: Sequence[Spelled]) -> bool:
    """Whether a word is in the name of a module, each of several in one."""
    words = (sign,) if isinstance(sign, str) else sign
    return all(any(word in one.module for one in of_model) for word in words)


def _is_down(spelled: Spelled | None) -> bool:
    return spelled is not None and spelled.role == "down"


def is_lookalike(
    other: Lookalike,
    spelled: Mapping[str, Spelled],
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> bool:
    """Whether a file is for the other family of the same names.

    Its width tells, or a fused module of other proportions (fewer heads have keys), or, where shapes leave it open,
    its header.
    """
    widths = set()
    for name, kind, factors in _reading_modules(other, spelled):
        rows, columns = _matrix(kind, {role: shapes[key] for role, key in factors.items()})
        if name == other.fused and rows and columns and rows != other.ratio * columns:
            return True
        if columns:
            widths.add(columns)
    if widths & {*other.widths, other.own}:
        return not widths.isdisjoint(other.widths)
    stated = " ".join(metadata.get(key, "") for key in _STATES_ORIGIN).lower()
    return other.word in stated and not any(name in stated for name in other.own_words)


def _reading_modules(other: Lookalike, spelled: Mapping[str, Spelled]) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Modules that read the main stream: the end of their names, the kind of adapter, and their keys by role."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for key, one in spelled.items():
        for name in other.reading:
            if one.role and one.kind and one.module.endswith(name.replace(".", "_") if one.is_flat else name):
                found.setdefault((one.module, name, one.kind), {})[one.role] = key
    for (_, name, kind), factors in found.items():
        yield name, kind, factors


def _matrix(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Rows and columns of a module's change, 0 where its factors do not say."""

    def side(axis: int, *factors: tuple[str, ...]) -> int:
        there = [next((shapes[role] for role in roles if role in shapes), ()) for roles in factors]
        return prod(shape[axis] for shape in there) if all(len(shape) > 1 for shape in there) else 0

    match kind:
        case "LoHa":
            return side(0, ("w1_a",)), side(1, ("w1_b",))
        case "LoKr":
            return side(0, ("w1", "w1_a"), ("w2", "w2_a")), side(1, ("w1", "w1_b"), ("w2", "w2_b"))
        case "whole difference":
            return side(0, ("diff",)), side(1, ("diff",))
    return side(0, ("up",)), side(1, ("down",))


def _depth(spelled: Spelled) -> int:
    flat = spelled.module.replace(".", "_").split("_")
    numbers = [int(word) for word in flat if word.isascii() and word.isdigit() and len(word) < 4]
    return max(numbers, default=0)


def trainer(metadata: Mapping[str, str]) -> str | None:
    """The program that wrote a file, by its header."""
    if "mergetool.version" in metadata:
        return "mergetool"
    try:
        software: Any = (
            json.loads(metadata["software"]) if len(metadata.get("software", "")) in range(1, 10_000) else {}
        )
    except (ValueError, RecursionError):
        software = {}
    if isinstance(software, dict) and isinstance(software.get("name"), str):
        return str(software["name"])[:60]
    module = metadata.get("ss_network_module", "")
    if module:
        return f"kohya-type trainer ({module[:60]})"
    if "lora_adapter_metadata" in metadata:
        return "diffusers"
    return metadata.get("modelspec.implementation", "")[:60] or None
