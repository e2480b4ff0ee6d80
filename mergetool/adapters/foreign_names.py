"""The formats for a LoRA of an unknown model: those whose program looks up its names.

Unknown models have their names in no table.

Programs give one model's modules different names, and of such a model no map between them is known here. So names are kept: those
under ``transformer.`` are diffusers' own, and ComfyUI looks its own up under ``diffusion_model.`` and, with underscores, ``lora_unet_``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mergetool.adapters.formats import FORMATS, KEY_FORMATS, KeyFormat, bare
from mergetool.adapters.keys import Spelled, take_apart
from mergetool.adapters.lora_file import LoraFile
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError

_COMFYUIS = re.compile(
    r"(?:double|single|joint|input|output)_blocks\.|middle_block\."  # Flux, Chroma, SD3; SD1, SDXL
    r"|(?:double|single)_layers\."  # AuraFlow
    r"|blocks\.\d+\.(?:(?:self|cross)_attn\.[qkvo]|ffn\.\d)$"  # Wan
    r"|(?:layers|noise_refiner|context_refiner)\.\d+\.attention\.(?:qkv|out)$"  # Lumina 2
)
"""Modules that ComfyUI's own code calls so, and diffusers' does not."""

_PREFIXES = {
    "diffusers": (frozenset({"transformer."}),),
    "comfyui": (frozenset({"diffusion_model.", "model.diffusion_model."}), frozenset({"lora_unet_"})),
}
"""The prefixes of either program: a file has some of one of these sets."""


def require_known(file: LoraFile, key_format: KeyFormat) -> None:
    """Raise DataError where the format's program may not load the names of ``file``."""
    if not file.family.keeps_names or _is_known(file, key_format):
        return
    others = " or ".join(f"`key_format={other}`" for other in KEY_FORMATS if _is_known(file, other))
    raise DataError(
        f'"{file.name}" is for a model whose names are not known here (its first module is {quoted(next(iter(file.adapters)).module)}), nor '
        f"what they would be in `key_format={key_format}`; "
        + (
            f"{others} keeps the names that it has."
            if others
            else "use the file as it is, or add it to its model with `mergetool lora bake`."
        )
    )


def _is_known(file: LoraFile, key_format: KeyFormat) -> bool:
    form, prefixes = FORMATS[key_format], {_prefix(next(iter(adapter.tensors.values()))) for adapter in file.adapters}
    if form.has_own_prefix and prefixes == {form.prefix}:
        return True
    are_theirs = form.looks_up == ("comfyui" if _are_comfyuis([bare(part) for part in file.changes]) else "diffusers")
    return are_theirs and any(prefixes <= known for known in _PREFIXES[form.looks_up or "diffusers"])


def _are_comfyuis(parts: Sequence[str]) -> bool:
    """Whether some of these names are ComfyUI's: a file has names of one kind."""
    return any(_COMFYUIS.match(part.removesuffix(".weight").removesuffix(".bias")) for part in parts)


def _prefix(key: str) -> str:
    found = take_apart(key)
    assert isinstance(found, Spelled)
    return found.prefix
