"""Who loads a LoRA file: what diffusers and ComfyUI make of each spelling of a Z-Image LoRA.

diffusers 0.42 was run on each; ComfyUI's column is what its source does (October 2025 to August 2026). Both leave out what they do not
map without an error, unless it is said.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mergetool.adapters.adapter import Adapter
from mergetool.adapters.keys import FLAT, Spelled, take_apart
from mergetool.adapters.reading import LoraFile
from mergetool.arch.z_image import PAD_TOKENS

PEFT_ENDS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class Loading:
    """How many of a file's modules a program applies, and why the others not, by module."""

    program: str
    applied: int
    dropped: dict[str, str]

    @property
    def verdict(self) -> str:
        """``whole``, ``partly`` or ``not at all``."""
        if not self.dropped:
            return "whole"
        return "partly" if self.applied else "not at all"


def loading(file: LoraFile) -> list[Loading]:
    """What diffusers and ComfyUI do with a Z-Image LoRA."""
    return [_judged(file, "diffusers", _by_diffusers), _judged(file, "ComfyUI", _by_comfyui)]


Judge = Callable[[LoraFile, Adapter, Spelled], str | None]


def _judged(file: LoraFile, program: str, judge: Judge) -> Loading:
    dropped = {}
    for adapter in file.adapters:
        spelled = take_apart(next(iter(adapter.tensors.values())))
        assert isinstance(spelled, Spelled)
        reason = judge(file, adapter, spelled)
        if reason is not None:
            dropped[adapter.module] = reason
    if program == "diffusers" and (fatal := _fatal(file)):
        dropped = dict.fromkeys((adapter.module for adapter in file.adapters), fatal)
    return Loading(program, len(file.adapters) - len(dropped), dropped)


def _fatal(file: LoraFile) -> str | None:
    """What makes diffusers reject a whole file."""
    for adapter in file.adapters:
        spelled = take_apart(next(iter(adapter.tensors.values())))
        assert isinstance(spelled, Spelled)
        if adapter.kind == "full":
            return "a .diff key makes it reject the file"
        if adapter.kind == "loha":
            return "LoHa makes it reject the file"
        if spelled.prefix == "transformer." and spelled.suffix not in PEFT_ENDS:
            return f"transformer. with {spelled.suffix} makes it reject the file"
        if spelled.prefix == "transformer." and f"{adapter.module}.alpha" in file.checkpoint.tensors:
            return "transformer. with .alpha makes it reject the file"
    return None


def _by_diffusers(file: LoraFile, adapter: Adapter, spelled: Spelled) -> str | None:
    if "dora_scale" in adapter.tensors:
        return "loaded without its DoRA magnitudes"
    if spelled.prefix.startswith("base_model.model."):
        return "raw PEFT names match nothing"
    if not spelled.prefix and ".default" not in spelled.suffix:
        return "names without a prefix match nothing"
    if spelled.prefix in ("lycoris_", "lora_transformer_", "unet."):
        return f"the prefix {spelled.prefix} is not known"
    if spelled.prefix not in FLAT and spelled.module.endswith(".attention.qkv"):
        return "fused qkv is dropped"
    if spelled.module.endswith(".attention.out") and spelled.suffix in PEFT_ENDS:
        return "ComfyUI's name of the output projection is dropped"
    return None


def _by_comfyui(file: LoraFile, adapter: Adapter, spelled: Spelled) -> str | None:
    if spelled.prefix.startswith("base_model.model.") or spelled.prefix in ("lora_transformer_", "unet."):
        return f"the prefix {spelled.prefix} is not mapped"
    parts = [part for part, changes in file.changes.items() if any(change.adapter is adapter for change in changes)]
    if PAD_TOKENS.intersection(parts):
        return "pad tokens are taken without being applied"
    if spelled.prefix == "lora_unet_" and "_attention_to_" in spelled.module:
        return "underscored names of split projections are not mapped"
    if spelled.prefix in ("transformer.", "", "lycoris_") and _is_native(spelled, parts):
        return "ComfyUI's own names are mapped under diffusion_model. and lora_unet_ only"
    return None


def _is_native(spelled: Spelled, parts: list[str]) -> bool:
    own = {part.removesuffix(".weight").removesuffix(".bias") for part in parts}
    return spelled.module not in own and spelled.module not in {name.replace(".", "_") for name in own}
