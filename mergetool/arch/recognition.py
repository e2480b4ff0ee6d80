"""Recognise a file by its tensor names: its family and anatomy, or no model at all."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from mergetool.arch import control, families, generic, prefixes
from mergetool.arch.anatomy import Anatomy, Part
from mergetool.arch.lora_keys import READ, adapter_kind
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import FamilyError
from mergetool.quant.encoding import Encoding


def recognise(
    tensors: Mapping[str, TensorInfo],
    *,
    source: str,
    encodings: Mapping[str, Encoding] = MappingProxyType({}),
    names_only: bool = False,
    config: Mapping[str, Any] | None = None,
) -> Anatomy:
    """Read the names of a file by a known family in any layout, else by the generic one.

    Any prefix may stand before them. A model of a family that has only a name is read as the generic one's are.

    ``tensors`` is a header's table in file order, ``encodings`` its quantised weights (`quant.weights`); ``source`` names
    the file in messages; ``config`` is the config.json beside it, which tells diffusers' layout of a family whose names are the same in another.

    Raises FamilyError for a file that is no model to merge (a LoRA, a ControlNet, no tensors at all), and for a file of a
    known family whose tensors contradict each other, which is shown as the generic family with ``names_only``: its values are codes that nobody reads.
    """
    _refuse_other_files(tensors, source)
    names = prefixes.read(tensors, source=source)
    beside = _values({stored: tensors[stored] for stored in names.outside}, encodings)
    outside = {stored: Part.whole(stored, info, encodings.get(stored)) for stored, info in beside.items()}
    values, coded = _own(names, tensors, encodings)
    try:
        family = families.shown_by(values)
        if family is not None:
            layout = "diffusers" if config and "_class_name" in config else None
            return family.read(names, values, coded, outside, source=source, layout=layout)
    except FamilyError:
        if not names_only:
            raise
    if control.kind_of(values) is not None:
        return generic.anatomy_of(names, values, coded, outside)
    named = families.named_by(values)
    whole = None if named else prefixes.whole(names)
    if whole is not None:
        names, (values, coded) = whole, _own(whole, tensors, encodings)
        named = families.named_by(values)
    return generic.anatomy_of(names, values, coded, outside, named or generic.GENERIC)


def _own(
    names: prefixes.Names, tensors: Mapping[str, TensorInfo], encodings: Mapping[str, Encoding]
) -> tuple[dict[str, TensorInfo], dict[str, Encoding]]:
    """The model's tensors under its own names, quantised weights as what they stand for, and the encodings of these."""
    coded = {name: encodings[stored] for stored, name in names.own.items() if stored in encodings}
    return _values({name: tensors[stored] for stored, name in names.own.items()}, coded), coded


def _values(tensors: Mapping[str, TensorInfo], encodings: Mapping[str, Encoding]) -> dict[str, TensorInfo]:
    """The table with quantised weights as the float32 matrices that their codes stand for."""
    return {
        name: TensorInfo(F32, encodings[name].shape, info.begin, info.end) if name in encodings else info
        for name, info in tensors.items()
    }


def _refuse_other_files(tensors: Mapping[str, TensorInfo], source: str) -> None:
    if not tensors:
        raise FamilyError(f'"{source}" has no tensors, where a model is wanted; check that it is the right file.')
    adapter = adapter_kind(tensors)
    if adapter is not None:
        raise FamilyError(_not_a_model(source, *adapter))
    if control.IN_FACTORS in tensors:
        raise FamilyError(
            f'"{source}" is a ControlNet-LoRA (tensor "{control.IN_FACTORS}"), factors of a ControlNet\'s difference from its model, which mergetool '
            "does not read; give a whole ControlNet, or add the file to its model in ComfyUI."
        )
    strangers = {name: what for family in families.FAMILIES for name, what in family.strangers.items()}
    for stored in tensors:
        name = prefixes.own(stored)
        what = strangers.get(name.split(".")[0]) or strangers.get(name)
        if what is not None:
            raise FamilyError(f'"{source}" is {what.format(tensor=quoted(stored))}.')


def _not_a_model(source: str, kind: str, key: str) -> str:
    """The error for a LoRA in the place of a model, with the ways to use it."""
    named = "a LoRA file" if kind == "LoRA" else f"a LoRA ({kind}) file"
    way_out = (
        f'add it to one: mergetool lora bake MODEL "{source}", or lora("{source}") in an expression.'
        if kind in READ
        else "apply it to its model in the program that it is for, save that model, and give it here."
    )
    return f'"{source}" is {named} (tensor {quoted(key)}), not a model; {way_out}'
