"""Choose the metadata of the anchor that travel into the output.

All do that stay true, except mergetool's own, which are written anew.

Configs, licences and model specs are needed to load and to pass on what was made of a model. Nothing that is left out is left out in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence

from mergetool.checkpoint.names import quoted
from mergetool.quant.weights import METADATA, metadata_layers
from mergetool.recipe.steps import Input

LARGEST_VALUE = 1 << 20
LARGEST_TOTAL = 8 << 20
"""Bytes of UTF-8 that one value, and all of them, may have: a header is read whole by every program that opens the file."""

OURS = re.compile(r"format|mergetool\..*")
_HASH = re.compile(r"(?:.*[._-])?(?:hash|sha256|md5|autov2|crc32)(?:[._-].*)?", re.IGNORECASE)
_MAKING = re.compile(r"prompt|workflow|extra_pnginfo")
_GGUF = re.compile(r"comfy\.gguf\..*|general\.(?:alignment|file_type|quantization_version)|split\..*|tokenizer\..*")
_LICENCE = re.compile(r"(?:.*[._-])?licen[cs]e(?:[._-].*)?", re.IGNORECASE)
_MOST_NAMED = 4


def travelling(first: Input, outputs: Collection[str], *, changed: bool) -> tuple[dict[str, str], list[str]]:
    """The metadata that travels to an output, and a warning for the rest.

    ``outputs`` are the output's tensors.

    ``changed`` says whether weights are merged: how the input was made is then not how the output was.
    """
    kept: dict[str, str] = {}
    dropped: dict[str, list[str]] = {}
    total = 0
    for key, text in sorted(first.checkpoint.metadata.items()):
        if OURS.fullmatch(key):
            continue
        value: str | None = text
        if key == METADATA:
            value = _layers_in(first, outputs)
        reason = _obstacle(key, first, changed) or ("of weights stored otherwise" if value is None else None)
        size = len(key.encode()) + len(text.encode())
        if reason is None and (size > LARGEST_VALUE or total + size > LARGEST_TOTAL):
            reason = f"{size} bytes, too long"
        if reason is not None or value is None:
            dropped.setdefault(str(reason), []).append(key)
            continue
        kept[key] = value
        total += size
    return kept, [f"{first.name}'s metadata without {_listed(dropped)}"] if dropped else []


def disagreements(inputs: Sequence[Input], carried: Mapping[str, str]) -> list[str]:
    """Warn of models whose metadata contradict ``carried``, or have another licence."""
    first, sentences = inputs[0], []
    for model in (model for model in inputs[1:] if not model.is_lora):
        theirs = model.checkpoint.metadata
        differing = [key for key in carried if key in theirs and theirs[key] != carried[key] and key != METADATA]
        if differing:
            sentences.append(
                f"the metadata of {first.name} and {model.name} differ ({_names(differing)}); the output has {first.name}'s"
            )
        lost = [key for key in sorted(theirs) if _LICENCE.fullmatch(key) and key not in first.checkpoint.metadata]
        if lost:
            sentences.append(f"{model.name} has metadata that the output does not: {_names(lost)}")
    return sentences


def _obstacle(key: str, first: Input, changed: bool) -> str | None:
    if _HASH.fullmatch(key):
        return "of other bytes"
    if changed and _MAKING.fullmatch(key):
        return f"how {first.name} was made"
    if first.checkpoint.container == "GGUF" and _GGUF.fullmatch(key):
        return "of the GGUF file"
    return None


def _layers_in(first: Input, outputs: Collection[str]) -> str | None:
    """``_quantization_metadata`` of the layers that are bundled with the model and copied; None where there are none."""
    text = first.checkpoint.metadata[METADATA]
    layers = metadata_layers({METADATA: text}, first.name)
    outside = first.anatomy.outside
    kept = [name for name in layers if f"{name}.weight" in outside and f"{name}.weight" in outputs]
    if len(kept) == len(layers):
        return text if kept else None
    stored = json.loads(text)
    return json.dumps({**stored, "layers": {name: stored["layers"][name] for name in kept}}) if kept else None


def _listed(dropped: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{_names(keys)} ({reason})" for reason, keys in dropped.items())


def _names(keys: Sequence[str]) -> str:
    shown = ", ".join(map(quoted, keys[:_MOST_NAMED]))
    return shown if len(keys) <= _MOST_NAMED else f"{shown} and {len(keys) - _MOST_NAMED} more"
