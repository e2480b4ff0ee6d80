"""The tensors that ComfyUI's own model classes have, and what it calls those of diffusers'."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.ops
import comfy.utils
import torch


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


COMMANDS = {"architecture": architecture, "diffusers_names": diffusers_names}
