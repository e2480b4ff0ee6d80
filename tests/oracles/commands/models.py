"""Loading a model file as ComfyUI's loader nodes do, and what is in it then."""

from __future__ import annotations

import dataclasses
import os
from functools import lru_cache
from typing import Any, NamedTuple

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch
from safetensors.torch import load_file, save_file


class Loaded(NamedTuple):
    """A model as ComfyUI's ``Load Diffusion Model`` node holds it, and how its names met the file's."""

    patcher: Any
    missing: list[str]
    unexpected: list[str]


def loaded(path: str) -> Loaded:
    """The model of the file at ``path``; the last ones are kept. The model must be left as it was found."""
    found = os.stat(path)
    return _loaded(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=4)
def _loaded(path: str, _changed: int, _size: int) -> Loaded:
    missing: list[str] = []
    unexpected: list[str] = []
    original = torch.nn.Module.load_state_dict

    def watched(self: torch.nn.Module, *args: Any, **how: Any) -> Any:
        met = original(self, *args, **how)
        missing.extend(met.missing_keys)
        unexpected.extend(met.unexpected_keys)
        return met

    torch.nn.Module.load_state_dict = watched  # type: ignore[method-assign, assignment]
    try:
        patcher = comfy.sd.load_diffusion_model(path)
    finally:
        torch.nn.Module.load_state_dict = original  # type: ignore[method-assign]
    return Loaded(patcher, missing, unexpected)


def values(patcher: Any) -> dict[str, torch.Tensor]:
    """Every parameter of a model in float32 by its name in the ComfyUI layout, quantised ones as ComfyUI decodes them."""
    found = {}
    for module_name, module in patcher.model.diffusion_model.named_modules():
        for leaf, parameter in (*module.named_parameters(recurse=False), *_kept_buffers(module)):
            if leaf in ("input_scale", "pre_quant_scale"):  # of a layer's inputs
                continue
            value = decoded(parameter.data)
            if leaf == "weight" and getattr(module, "pre_quant_scale", None) is not None:
                value = (
                    value * module.pre_quant_scale.float()
                )  # of the layer's inputs: the same as of the weight's columns
            found[".".join(filter(None, (module_name, leaf)))] = value.contiguous().clone()
    return found


def _kept_buffers(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The buffers that a file holds, such as SD3's table of positions."""
    return [one for one in module.named_buffers(recurse=False) if one[0] not in module._non_persistent_buffers_set]


def decoded(value: torch.Tensor) -> torch.Tensor:
    """A parameter in float32; where it is quantised, without rounding it to the type that layers compute in first."""
    if hasattr(value, "_qdata"):
        params = dataclasses.replace(value._params, orig_dtype=torch.float32)
        value = type(value)(value._qdata, value._layout_cls, params).dequantize()
    return value.detach().to(torch.float32)


def load(model: str) -> dict[str, Any]:
    """``missing`` and ``unexpected`` names, the ``model`` and ``config`` classes, ``dtype`` and the number of ``parameters``."""
    patcher, missing, unexpected = loaded(model)
    inner = patcher.model
    return {
        "missing": missing,
        "unexpected": unexpected,
        "model": type(inner).__name__,
        "config": type(inner.model_config).__name__,
        "dtype": str(inner.get_dtype()).removeprefix("torch."),
        "parameters": len(list(inner.diffusion_model.parameters())),
    }


def weights(model: str, out: str) -> dict[str, Any]:
    """Writes every parameter in float32 to the safetensors file ``out``; see ``values``."""
    save_file(values(loaded(model).patcher), out)
    return {}


def forward(model: str, inputs: str, out: str) -> dict[str, Any]:
    """Writes as ``x`` what the model makes of ``x`` [n, 16, h, w], ``sigma`` [n] and ``context`` [n, tokens, width] in the file ``inputs``."""
    given = load_file(inputs)
    patcher = loaded(model).patcher
    comfy.model_management.load_models_gpu([patcher])
    context = given["context"]
    x = patcher.model.apply_model(given["x"], given["sigma"], c_crossattn=context, num_tokens=context.shape[1])
    save_file({"x": x.float().contiguous()}, out)
    return {}


def recognise(shapes: dict[str, list[int]], dtypes_only: bool = False) -> dict[str, Any]:
    """What ComfyUI takes a model of any size for by its names and ``shapes``, as ``load`` says it; no weights are made.

    With ``dtypes_only`` the answer is the dtypes that ComfyUI computes in.
    """
    tensors = {
        name: torch.zeros(shape) if len(shape) == 1 else torch.empty(shape, device="meta")
        for name, shape in shapes.items()
    }
    prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
    bare = comfy.utils.state_dict_prefix_replace(dict(tensors), {prefix: ""}, filter_keys=True) or tensors
    config = comfy.model_detection.model_config_from_unet(bare, "")
    if dtypes_only:
        return {"dtypes": [str(dtype).removeprefix("torch.") for dtype in config.supported_inference_dtypes]}
    if config is None:  # diffusers' names, as load_diffusion_model looks for them
        renamed = comfy.model_detection.convert_diffusers_mmdit(bare, "")
        if renamed is None:
            config = comfy.model_detection.model_config_from_diffusers_unet(bare)
            names = comfy.utils.unet_to_diffusers(config.unet_config)
            renamed = {names[name]: tensor for name, tensor in bare.items()}
        else:
            config = comfy.model_detection.model_config_from_unet(renamed, "")
        bare = renamed
    config.set_inference_dtype(torch.bfloat16, None)
    inner = config.get_model(bare, "", device="meta").diffusion_model
    met = inner.load_state_dict(bare, strict=False, assign=True)
    return {
        "config": type(config).__name__,
        "missing": met.missing_keys,
        "unexpected": met.unexpected_keys,
        "parameters": len(inner.state_dict()),
    }


COMMANDS = {"load": load, "recognise": recognise, "weights": weights, "forward": forward}
