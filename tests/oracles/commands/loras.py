"""LoRAs as ComfyUI's loader node adds them: which names it knows, and what a model is afterwards."""

from __future__ import annotations

from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import save_file

from tests.oracles.commands.models import loaded, values

CPU = torch.device("cpu")


def names(model: str) -> dict[str, Any]:
    """``names``: every module name that ComfyUI knows for a model -> the tensor, first row and number of rows (None: all of it)."""
    found = comfy.lora.model_lora_keys_unet(loaded(model).patcher.model, {})
    return {"names": {name: target(key) for name, key in found.items()}}


def target(key: Any) -> list[Any]:
    """A target of ComfyUI's map, which is a name or a name with (dimension, start, length)."""
    if isinstance(key, str):
        return [key, None, None]
    name, (dimension, start, length) = key
    assert dimension == 0
    return [name, start, length]


def patch(model: str, lora: str, out: str, strength: float = 1.0) -> dict[str, Any]:
    """Writes the model's parameters in float32 with the LoRA added; ``patched`` are the names of those it was added to."""
    patcher = loaded(model).patcher
    file, metadata = comfy.utils.load_torch_file(lora, safe_load=True, return_metadata=True)
    changed, _ = comfy.sd.load_lora_for_models(patcher, None, file, strength, 0, lora_metadata=metadata)
    save_file(patched(changed), out)
    return {"patched": sorted(changed.patches)}


def patched(patcher: Any) -> dict[str, torch.Tensor]:
    """A model's parameters in float32 with its patches applied, as they would be for sampling; the model is left as it was."""
    patcher.patch_model(device_to=CPU)
    try:
        return values(patcher)
    finally:
        patcher.unpatch_model()


def add(weights: str, lora: str, out: str, strength: float = 1.0) -> dict[str, Any]:
    """Adds a LoRA to the tensors of a safetensors file, in place of a model: module ``m`` of the LoRA is tensor ``m.weight``.

    For what models of this size cannot hold, such as convolutions. Writes the tensors afterwards, in float32.
    """
    tensors = {name: tensor.float() for name, tensor in comfy.utils.load_torch_file(weights).items()}
    modules = {name.removesuffix(".weight"): name for name in tensors if name.endswith(".weight")}
    adapters = comfy.lora.load_lora(comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(lora)), modules)
    for name, adapter in adapters.items():
        tensors[name] = comfy.lora.calculate_weight([(strength, adapter, 1.0, None, None)], tensors[name], name)
    save_file(tensors, out)
    return {"patched": sorted(adapters)}


COMMANDS = {"names": names, "patch": patch, "add": add}
