"""The tensors that ComfyUI's own model classes have, and what it calls those of diffusers'."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_detection
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.audio.embedders import NumberConditioner

_BUILT: dict[str, dict[str, torch.Tensor]] = {}


def architecture(module: str, model: str, config: dict[str, Any]) -> dict[str, Any]:
    """Name -> shape of every tensor of a class of ``comfy.ldm``, built without memory."""
    built = getattr(importlib.import_module(f"comfy.ldm.{module}"), model)
    made = built(**config, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return {"tensors": {name: list(tensor.shape) for name, tensor in made.state_dict().items()}}


def diffusers_names(function: str, config: dict[str, Any]) -> dict[str, Any]:
    """``names``: diffusers' name of a tensor -> ComfyUI's by a ``function`` of ``comfy.utils``, first row and rows (None: all), and whether halves are swapped."""
    found: dict[str, list[Any]] = {}
    for theirs, target in getattr(comfy.utils, function)(config).items():
        name, place, *swap = target if isinstance(target, tuple) else (target, None)
        found[theirs] = [name, *((None, None) if place is None else place[1:]), bool(swap)]
    return {"names": found}


def supported(configs: dict[str, Any], kin: dict[str, Any], prefixes: dict[str, str]) -> dict[str, Any]:
    """``models``: of each of ComfyUI's list and of ``kin`` its ``tensors`` as files name them, its ``linear`` weights and the class ``detected``.

    They are built without memory, from their ``configs`` and the entries of their class.
    """
    classes = {one.__name__: one for one in comfy.supported_models.models}
    wanted = {name: (name, configs.get(name, {})) for name in classes} | kin
    models = {}
    for name, (of, config) in wanted.items():
        made = built(classes[of], config)
        prefix = prefixes.get(of, "")
        _BUILT[name] = beside(of, config) | {f"{prefix}{key}": tensor for key, tensor in made.state_dict().items()}
        found = comfy.model_detection.model_config_from_unet(_BUILT[name], "")
        models[name] = {
            "tensors": {f"{prefix}{key}": list(tensor.shape) for key, tensor in made.state_dict().items()},
            "linear": [
                f"{prefix}{key}.weight" for key, one in made.named_modules() if isinstance(one, torch.nn.Linear)
            ],
            "detected": type(found).__name__,
        }
    return {"models": models}


def class_of(of: str, config: dict[str, Any]) -> dict[str, Any]:
    """``tensors``: name -> shape of a class of the list with a configuration."""
    (one,) = (one for one in comfy.supported_models.models if one.__name__ == of)
    return {"tensors": {name: list(tensor.shape) for name, tensor in built(one, config).state_dict().items()}}


def built(one: Any, config: dict[str, Any]) -> torch.nn.Module:
    """The diffusion model of a class of the list; a tokenizer's constants need memory."""
    device = "cpu" if one.unet_config.get("audio_model") == "ace1.5" else "meta"
    made = one({**config, **one.unet_config}).get_model(beside(one.__name__, config), "", device=device)
    model: torch.nn.Module = made.diffusion_model
    return model


def beside(name: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What a class reads that lies beside its model in a file."""
    if name == "Stable_Zero123":
        return {"cc_projection.weight": torch.empty(768, 772), "cc_projection.bias": torch.empty(768)}
    if not name.startswith("StableAudio"):
        return {}
    embedder = NumberConditioner(768, fourier_features_type=config["timestep_features_type"]).state_dict()
    places = (f"conditioner.conditioners.{place}." for place in ("seconds_start", "seconds_total"))
    return {f"{place}{key}": tensor for place in places for key, tensor in embedder.items()}


def packed(name: str, weights: list[str]) -> dict[str, Any]:
    """Whether the same configuration is detected of a model of `supported` with half the columns in ``weights``."""
    tensors = _BUILT[name]
    halved = {key: tensors[key].new_empty((tensors[key].shape[0], tensors[key].shape[1] // 2)) for key in weights}
    before, after = (comfy.model_detection.detect_unet_config(held, "") for held in (tensors, tensors | halved))
    return {"same": before == after}


def loaded_lora(of: str, config: dict[str, Any], lora: str) -> dict[str, Any]:
    """``loaded``: the tensors of a class of the list that a LoRA file changes; the log names the keys that it leaves out."""
    (one,) = (one for one in comfy.supported_models.models if one.__name__ == of)
    model = one({**config, **one.unet_config}).get_model(beside(of, config), "", device="meta")
    keys = comfy.lora.model_lora_keys_unet(model, {})
    file = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(lora))
    return {"loaded": sorted(comfy.lora.load_lora(file, keys))}


COMMANDS = {
    "architecture": architecture,
    "diffusers_names": diffusers_names,
    "supported": supported,
    "packed": packed,
    "class_of": class_of,
    "loaded_lora": loaded_lora,
}
