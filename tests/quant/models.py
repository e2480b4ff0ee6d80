"""Small Z-Image checkpoints in every quantised container, made from a plain one by comfy-kitchen or ``gguf``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy_kitchen
import gguf
import numpy as np
import torch
from comfy_kitchen.backends.eager import svdquant, w4a8_int8
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)
from safetensors.torch import load_file

from tests.quant.files import marker, written
from tests.quant.ggml import Q, packed, write

LAYOUTS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "fp8": (TensorCoreFP8Layout, {}, {"format": "float8_e4m3fn"}),
    "nvfp4": (TensorCoreNVFP4Layout, {}, {"format": "nvfp4"}),
    "mxfp8": (TensorCoreMXFP8Layout, {}, {"format": "mxfp8"}),
    "int8": (TensorWiseINT8Layout, {"per_channel": True}, {"format": "int8_tensorwise"}),
    "convrot": (
        TensorWiseINT8Layout,
        {"per_channel": True, "convrot": True, "convrot_groupsize": 16},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16},
    ),
}
LAYOUTS["w4a4"] = (
    TensorCoreConvRotW4A4Layout,
    {"convrot_groupsize": 64},
    {"format": "convrot_w4a4", "convrot_groupsize": 64},
)
LAYOUTS["w4a8"] = AsymW4A8Int8Layout, {"convrot_groupsize": 16}, {"format": "asym_w4a8_int8", "convrot_groupsize": 16}
CONTAINERS = (*LAYOUTS, "old fp8", "fp8 rows", "raw fp8")


def is_large(name: str, tensor: torch.Tensor) -> bool:
    """The matrices of attention and feed-forward, which published files quantise."""
    return tensor.ndim == 2 and ("attention" in name or "feed_forward" in name) and "norm" not in name


def quantised(path: Path, source: Path, container: str, *, refiners: bool = True) -> dict[str, np.ndarray]:
    """Write ``source`` in a container and return the values that its weights now have, float32, by stored name."""
    stored: dict[str, torch.Tensor] = {}
    values: dict[str, np.ndarray] = {}
    for name, tensor in load_file(source).items():
        matrix, layer = tensor.float(), name.removesuffix(".weight")
        if not is_large(name, tensor) or ("refiner" in name and not refiners):
            stored[name], values[name] = tensor, matrix.numpy()
        elif container in LAYOUTS:
            fits = matrix.shape[1] % LAYOUTS[container][1].get("convrot_groupsize", 1) == 0
            layout, how, config = LAYOUTS[container if fits else "int8"]
            with comfy_kitchen.use_backend("eager"):
                codes, params = layout.quantize(matrix, **how)
                back = layout.dequantize(codes, params)[: matrix.shape[0], : matrix.shape[1]]
            stored |= {f"{name}{leaf}": part for leaf, part in layout.state_dict_tensors(codes, params).items()}
            stored[f"{layer}.comfy_quant"] = marker(config)
            rotated = getattr(params, "convrot", hasattr(params, "convrot_groupsize"))
            values[name] = _unrotated(codes, params) if rotated else back.numpy()
        else:
            by_rows = container == "fp8 rows"
            scale = matrix.abs().amax(dim=1 if by_rows else None, keepdim=by_rows) / 448
            scale = torch.ones(()) if container == "raw fp8" else scale
            codes = (matrix / scale).to(torch.float8_e4m3fn)
            stored[name], values[name] = codes, (codes.float() * scale).numpy()
            if container != "raw fp8":
                stored[f"{layer}.{'weight_scale' if by_rows else 'scale_weight'}"] = scale
    if container == "old fp8":
        stored["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    written(path, stored)
    return values


def _unrotated(codes: torch.Tensor, params: Any) -> np.ndarray:
    """Rotated integers in float64, rounded once: comfy-kitchen adds numbers that are rounded already."""
    scale = params.scale
    if isinstance(params, AsymW4A8Int8Layout.Params):
        codes = w4a8_int8._dequant_int4_grouped_to_int8(codes, scale, params.codebook, params.group_size)
        scale = params.s_channel
    elif isinstance(params, TensorCoreConvRotW4A4Layout.Params):
        codes = svdquant._unpack_int4_row_major(codes)
    matrix = comfy_kitchen.tensor.int8_utils._build_hadamard(params.convrot_groupsize).double()
    groups = codes.double().reshape(len(codes), -1, params.convrot_groupsize)
    return ((groups @ matrix).reshape(codes.shape) * scale.double().reshape(-1, 1)).float().numpy()


def as_gguf(path: Path, source: Path, kind: Q) -> dict[str, np.ndarray]:
    """Write ``source`` as GGUF: large matrices as ``kind``, small tensors F32, the rest BF16, pad tokens flattened."""
    tensors, values = {}, {}
    for name, tensor in load_file(source).items():
        array = tensor.float().numpy()
        blocks = is_large(name, tensor) and array.shape[1] % 256 == 0
        if name.endswith("pad_token"):
            array = array.reshape(-1)
        stored = kind if blocks else Q.F32 if array.ndim == 1 else Q.BF16
        tensors[name] = (array, stored)
        values[name] = gguf.quants.dequantize(packed(array, stored), stored)
    write(path, tensors)
    return values
