"""Check that two models meet: their parameters lie under the same names.

Parts that do not meet are not merged, so a merge of two files in different layouts would be a copy. Three things are refused:

* no parameter meets;
* less than `LEAST` of the parameters of both meet, as where two layouts have some norms in common;
* what does not meet is as large in both (within `EQUAL`), so that it looks like the same parameters under other names.

A share of more than `WORTH_SAYING` that does not meet, of either, is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Protocol

from mergetool.arch.anatomy import Anatomy, Part
from mergetool.arch.families import FAMILIES
from mergetool.arch.generic import GENERIC
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError

LEAST = 0.5
EQUAL = 0.01
WORTH_SAYING = 0.01
"""A block of a model of thirty is 3 % of it."""


class Recognised(Protocol):
    """A name and a file's anatomy."""

    @property
    def name(self) -> str:
        """The name in messages."""

    @property
    def anatomy(self) -> Anatomy:
        """Its parts."""


def check_families(first: Recognised, other: Recognised, *, by_name: bool = False) -> None:
    """Raise FamilyError for models of two families, naming a tensor of each.

    A ControlNet meets the model of whose encoder it is a copy where the user chose the parts ``by_name``. A model without a family may be a piece of
    one whose tensors keep their names too; what meets decides then.
    """
    one, two = first.anatomy.family, other.anatomy.family
    if one is two or (GENERIC in (one, two) and one.keeps_names and two.keeps_names):
        return
    kinds = [f"{model.name} is {_kind(model)} ({_example(model)})" for model in (first, other)]
    if one.copy_of is two or two.copy_of is one:
        if by_name:
            return
        raise FamilyError(
            f"{kinds[0]}, {kinds[1]}; a ControlNet has only the encoder in common with its model, as a copy that was trained on: to give it a "
            "fine-tune's change, name what is to be changed, as in `include=input_blocks`; else choose two of one kind."
        )
    raise FamilyError(
        f"{kinds[0]}, {kinds[1]}; models of different families have no tensor in common that could be merged or compared: "
        "choose two of one family."
    )


def check(
    first: Recognised, other: Recognised, chosen: Collection[str] | None = None, carried: Collection[str] = ()
) -> list[str]:
    """Compare the parts of two models, and describe large mismatches.

    ``chosen`` are the parts of ``first`` that count, None for all; ``carried`` those of ``other`` that are used though ``first`` lacks them.

    A part meets where both models have it as floats; those beside a model do not count. Raises FamilyError for models that do not meet.
    """
    mine, theirs = first.anatomy.own, other.anatomy.own
    wanted = _floats({name: mine[name] for name in (mine if chosen is None else chosen) if name in mine})
    offered = _floats(theirs)
    if not wanted:
        return []
    alone = {name: part for name, part in wanted.items() if name not in offered}
    strange = {name: part for name, part in offered.items() if name not in mine}
    if len(alone) == len(wanted):
        raise _nothing_met(first, other, wanted, strange)
    missing, left = _size(alone) / _size(wanted), _size(strange) / _size(offered)
    if min(missing, left) > 1 - LEAST or _are_equal(alone, strange):
        raise FamilyError(
            f"{100 * (1 - missing):.2g} % of the parameters of {first.name} are in {other.name} under the same names, which looks like two "
            f"layouts of one model: the one has {_name(alone, first)}, the other {_name(strange, other)}; {_WAY_OUT}, or leave what has no "
            f"counterpart out, as with `exclude={quoted(next(iter(alone)))}`."
        )
    said = []
    if missing > WORTH_SAYING:
        said.append(
            f"{100 * missing:.2g} % of the parameters of {first.name} are not in {other.name} and stay as they are ({_name(alone, first)})"
        )
    strange = {name: part for name, part in strange.items() if name not in carried}
    left = _size(strange) / _size(offered)
    if left > WORTH_SAYING:
        said.append(
            f"{100 * left:.2g} % of the parameters of {other.name} are not in {first.name} and are left out ({_name(strange, other)})"
        )
    return said


def check_change(
    first: Recognised, lora: Recognised, chosen: Collection[str], unmatched: Collection[tuple[str, str]]
) -> None:
    """Raise FamilyError for a LoRA that changes none of the ``chosen`` parts of ``first``.

    ``unmatched`` are keys that change nothing, with the reason.
    """
    if not chosen or not lora.anatomy.parts.keys().isdisjoint(chosen):
        return
    if lora.anatomy.parts:
        raise FamilyError(
            f"the LoRA {lora.name} changes nothing of {first.name} that is to be merged ({_name({}, lora)} is left alone); choose other parts "
            "with `include`, `exclude`, `protect` or `multipliers`, or leave the LoRA out."
        )
    key = next((f"{quoted(key)} ({reason})" for key, reason in unmatched), "it has none")
    raise FamilyError(
        f"no key of the LoRA {lora.name} is of a module of {first.name}: {key}, where {first.name} has {_example(first)}; give the model "
        "that the LoRA was made for."
    )


def _kind(model: Recognised) -> str:
    family = model.anatomy.family
    variant = family.variant(model.anatomy) if family is GENERIC else None
    kind = variant or (family.name if family.copy_of else f"{family.name} model")
    return f"{'an' if _VOWEL.match(kind) else 'a'} {kind}"


_VOWEL = re.compile("[AEIO]|[FHLMNRSX][A-Z]")  # an ACE-Step model, an SDXL model


_WAY_OUT = (
    f"give both files in one layout (`mergetool convert` with `layout` knows those of {', '.join(family.name for family in FAMILIES)}; "
    "of another family take the file that is in the same layout, ComfyUI's or diffusers')"
)


def _nothing_met(
    first: Recognised, other: Recognised, wanted: Mapping[str, Part], strange: Mapping[str, Part]
) -> FamilyError:
    mine, theirs = first.anatomy.parts, other.anatomy.parts
    common = [name for name in wanted if name in theirs]
    if common:
        return FamilyError(
            f"none of the {len(common)} tensors that {first.name} and {other.name} have in common is of floats in both "
            f"({quoted(common[0])} is {mine[common[0]].dtype.name} and {theirs[common[0]].dtype.name}), so nothing can be merged or compared; "
            "give the unquantised original."
        )
    if any(name in mine for name in theirs):
        return FamilyError(
            f"nothing of {first.name} that is to be merged or compared is in {other.name} ({_name(wanted, first)} is not); choose other "
            "parts with `include`, `exclude` or `protect`, or another model."
        )
    return FamilyError(
        f"no tensor of {other.name} has the name of one of {first.name}: the one has {_name(strange or theirs, other)}, the other "
        f"{_name(wanted, first)}; {_WAY_OUT}."
    )


def _floats(parts: Mapping[str, Part]) -> dict[str, Part]:
    return {name: part for name, part in parts.items() if part.dtype.blendable and part.numel}


def _size(parts: Mapping[str, Part]) -> int:
    return sum(part.numel for part in parts.values())


def _are_equal(alone: Mapping[str, Part], strange: Mapping[str, Part]) -> bool:
    """Whether the parts that only one of two models has are as large as the other's; a single tensor each may be by chance."""
    one, other = _size(alone), _size(strange)
    return min(len(alone), len(strange)) > 1 and abs(one - other) <= EQUAL * max(one, other)


def _name(parts: Mapping[str, Part], model: Recognised) -> str:
    """The name, as it is stored, of the first of the largest tensors of ``parts``; of all parts of the model where there are none."""
    largest = max((parts or model.anatomy.parts).values(), key=lambda part: part.numel)
    return quoted(largest.stored.tensor)


def _example(model: Recognised) -> str:
    return f"tensor {_name({}, model)}" if model.anatomy.parts else "no tensor"
