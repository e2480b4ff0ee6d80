"""Who loads a LoRA file: what diffusers and ComfyUI make of each spelling of a Z-Image LoRA.

diffusers 0.42.1 and ComfyUI 0.30.0 are run on each in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mergetool.adapters import in_diffusers
from mergetool.adapters.adapter import Adapter, Change
from mergetool.adapters.keys import Spelled, take_apart
from mergetool.adapters.reading import LoraFile
from mergetool.arch.z_image import PAD_TOKENS, Z_IMAGE

Verdict = Literal["whole", "partly", "not at all"]

IN_COMFYUI = ("diffusion_model.", "lora_unet_", "transformer.", "lycoris_", "")
"""Prefixes that ComfyUI maps; the last three before diffusers' names only."""


@dataclass(frozen=True, slots=True)
class Loading:
    """What a program makes of a file: the parts of the model that it changes as the file means it, and why not the others.

    ``error`` is what makes it reject the file, where it does. What is dropped otherwise is dropped in silence, or with a line in a log.
    """

    program: str
    applied: int
    dropped: dict[str, str]
    error: str | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the file is loaded."""
        if not self.dropped:
            return "whole"
        return "partly" if self.applied else "not at all"


def loading(file: LoraFile) -> list[Loading]:
    """What diffusers and ComfyUI do with a LoRA; nothing is known of other families than Z-Image, so an empty list."""
    return [_in_diffusers(file), _in_comfyui(file)] if file.family is Z_IMAGE else []


def _in_diffusers(file: LoraFile) -> Loading:
    try:
        layers = in_diffusers.modules(file.checkpoint.tensors)
    except in_diffusers.Rejected as reason:
        return _rejected(file, str(reason))
    names = {part.removesuffix(".weight") for part in file.changes}
    if layers and not names & layers.keys():
        return _rejected(file, f'it finds no module "{next(iter(layers))}"')
    dropped = {}
    for part, changes in file.changes.items():
        keys = layers.get(part.removesuffix(".weight"), set())
        loaded = [change for change in changes if keys & set(change.adapter.tensors.values())]
        if not loaded:
            dropped[part] = _why_not_in_diffusers(changes[0])
        elif "dora_scale" in loaded[0].adapter.tensors and not keys & {loaded[0].adapter.tensors["dora_scale"]}:
            dropped[part] = "loaded without its DoRA magnitudes"
        elif len(loaded) < len(changes):
            dropped[part] = f"loaded with {len(loaded)} of its {len(changes)} changes"
        elif _alpha_is_outside(file, loaded[0].adapter) and "lora_adapter_metadata" not in file.checkpoint.metadata:
            dropped[part] = "the alpha in adapter_config.json is not read"
    return Loading("diffusers", len(file.changes) - len(dropped), dropped)


def _rejected(file: LoraFile, reason: str) -> Loading:
    return Loading("diffusers", 0, dict.fromkeys(file.changes, "the whole file is rejected"), reason)


def _why_not_in_diffusers(change: Change) -> str:
    spelled = _spelled(change.adapter)
    if spelled.prefix.startswith("base_model.model."):
        return "raw PEFT names match nothing"
    if not spelled.prefix:
        return "names without a prefix match nothing"
    if spelled.module.endswith((".attention.qkv", ".attention.out")):
        return "ComfyUI's fused names match nothing"
    return f'no module is found under "{spelled.prefix}"'


def _in_comfyui(file: LoraFile) -> Loading:
    dropped = {}
    for part, changes in file.changes.items():
        reasons = [_why_not_in_comfyui(file, change) for change in changes]
        why = next((reason for reason in reasons if reason is not None), None)
        if why is not None:
            dropped[part] = why if len(reasons) == 1 else f"loaded with only some of its {len(reasons)} changes: {why}"
        elif len({(change.row, change.adapter.shape[0]) for change in changes}) < len(changes):
            dropped[part] = (
                f"loaded with only some of its {len(reasons)} changes: of those of the same rows, the last is kept"
            )
    return Loading("ComfyUI", len(file.changes) - len(dropped), dropped)


def _why_not_in_comfyui(file: LoraFile, change: Change) -> str | None:
    adapter, part = change.adapter, change.part
    spelled = _spelled(adapter)
    own = part.removesuffix(".weight").removesuffix(".bias")
    native = Z_IMAGE.stored_name(part, "comfyui").removesuffix(".weight").removesuffix(".bias")
    is_flat = spelled.prefix in ("lora_unet_", "lycoris_")
    own, native = (name.replace(".", "_") if is_flat else name for name in (own, native))
    if spelled.prefix not in IN_COMFYUI:
        return f'the prefix "{spelled.prefix}" is not mapped'
    if part in PAD_TOKENS:
        return "pad tokens are taken without being applied"
    if spelled.prefix == "lora_unet_" and spelled.module != native:
        return "underscored names of diffusers' modules are not mapped"
    if spelled.prefix in ("transformer.", "lycoris_", "") and spelled.module != own:
        return "ComfyUI's own names are mapped under diffusion_model. and lora_unet_ only"
    if "magnitude_vector" in adapter.tensors.get("dora_scale", ""):
        return "loaded without its DoRA magnitudes"
    if _alpha_is_outside(file, adapter):
        return f"loaded at scale 1 instead of {adapter.scale:g}: no alpha beside the factors"
    return None


def _alpha_is_outside(file: LoraFile, adapter: Adapter) -> bool:
    """Whether a scale comes from the header or a config, and matters."""
    return adapter.has_alpha and adapter.scale != 1 and f"{adapter.module}.alpha" not in file.checkpoint.tensors


def _spelled(adapter: Adapter) -> Spelled:
    found = take_apart(next(iter(adapter.tensors.values())))
    assert isinstance(found, Spelled)
    return found
