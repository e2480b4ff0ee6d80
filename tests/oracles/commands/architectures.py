"""The tensors that ComfyUI's own model classes have."""

from __future__ import annotations

import importlib
from typing import Any

import comfy.ops
import torch


def architecture(module: str, model: str, config: dict[str, Any]) -> dict[str, Any]:
    """Name -> shape of every tensor of a class of ``comfy.ldm``, built without memory."""
    built = getattr(importlib.import_module(f"comfy.ldm.{module}"), model)
    made = built(**config, device="meta", dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    return {"tensors": {name: list(tensor.shape) for name, tensor in made.state_dict().items()}}


COMMANDS = {"architecture": architecture}
