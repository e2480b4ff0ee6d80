"""Quantised files as ComfyUI's own layouts make them."""

from __future__ import annotations

import json
from typing import Any

import comfy.quant_ops
import comfy.utils
import torch
from safetensors.torch import save_file


def quantise(
    model: str,
    out: str,
    kind: str,
    dtype: str = "float32",
    how: dict[str, Any] | None = None,
    said: dict[str, Any] | None = None,
    beside: dict[str, float] | None = None,
    in_header: bool = False,
) -> dict[str, Any]:
    """Writes a model with the matrices of its blocks quantised, as ComfyUI's layout ``kind`` does it with the arguments ``how``.

    ``dtype`` is what is quantised. ``said`` goes into each layer's JSON, which is a ``.comfy_quant`` tensor or stands in the file's header;
    ``beside`` are tensors beside each weight, of one number each, or as long as the layer's input where the name is ``pre_quant_scale``.
    Returns the names of the ``quantised`` weights.
    """
    layout = comfy.quant_ops.QUANT_ALGOS[kind]["comfy_tensor_layout"]
    stored: dict[str, torch.Tensor] = {}
    layers = {}
    # Rotations go by whole groups; of a smoothed layer whose last block is filled up, mergetool refuses the factors of its inputs.
    group = (how or {}).get("convrot_groupsize", 16 if "pre_quant_scale" in (beside or {}) else 1)
    for name, tensor in comfy.utils.load_torch_file(model).items():
        if tensor.ndim != 2 or not ("attention" in name or "feed_forward" in name) or tensor.shape[1] % group:
            stored[name] = tensor
            continue
        matrix = tensor.to(getattr(torch, dtype))
        quantised = comfy.quant_ops.QuantizedTensor.from_float(matrix, layout, **(how or {}))
        stored |= quantised.state_dict(name)
        layer = name.removesuffix(".weight")
        layers[layer] = {"format": kind, **(said or {})}
        for leaf, value in (beside or {}).items():
            shape = (tensor.shape[1],) if leaf == "pre_quant_scale" else ()
            stored[f"{layer}.{leaf}"] = torch.full(shape, value)
    metadata = (
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})} if in_header else None
    )
    if not in_header:
        for layer, config in layers.items():
            stored[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, out, metadata)
    return {"quantised": [f"{layer}.weight" for layer in layers]}


COMMANDS = {"quantise": quantise}
