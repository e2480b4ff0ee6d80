"""Which quantised container a file is, told from its tensor names, dtypes and config alone.

This version reads plain floats only: BF16, FP16, FP32, and FP8 made by a bare cast. In every other container
a stored value means something only together with its scales, and merging those as weights gives noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError

_SCALED_FP8 = frozenset({"scaled_fp8", "scale_weight", "scale_input"})
_PER_LAYER = frozenset({"weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale"})
_CODEBOOK = frozenset({"weight_s_rel", "weight_s_channel", "weight_codebook"})
_BITSANDBYTES = frozenset({"SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map"})
_SVDQUANT = frozenset({"qweight", "wscales", "wzeros", "wcscales", "wtscale", "smooth_factor", "smooth_factor_orig"})
_SIDE = _SCALED_FP8 | _PER_LAYER | _CODEBOOK | _BITSANDBYTES | _SVDQUANT | {"comfy_quant"}

# Where an all-in-one checkpoint keeps its diffusion model. Its bundled text encoder may be quantised: that
# part is copied with its scales, bit for bit, and concerns nobody here.
_BUNDLED_MODEL = "model.diffusion_model."


def is_side_tensor(name: str) -> bool:
    """True for a tensor that only means something beside a quantised weight: a marker, a scale, a codebook."""
    return _leaf(name) in _SIDE or ".quant_state.bitsandbytes__" in name


def quantised_container(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
) -> tuple[str, str] | None:
    """The container's name and what shows it, or None for plain floats (raw FP8 casts included).

    ``tensors`` and ``metadata`` come from the header, ``config`` from config.json where there is one. In an
    all-in-one checkpoint only the diffusion model is looked at.
    """
    model = {name: info for name, info in tensors.items() if name.startswith(_BUNDLED_MODEL)} or tensors
    for container, shows in _BY_NAME:
        for name in model:
            if shows(name):
                return container, f"tensor {quoted(name)}"
    layer = _quantised_layer(model, metadata)
    if layer is not None:
        return "a ComfyUI mixed-precision file", f"metadata _quantization_metadata, {layer}"
    method = _config_method(config)
    if method is not None:
        return f"a {method} file", "quantization_config in config.json"
    for name, info in model.items():
        if name.endswith(".weight") and len(info.shape) >= 2 and _packed(info):
            return f"a file of packed {info.dtype.code} weights", f"tensor {quoted(name)}"
    return None


def refuse_quantised(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    source: str,
) -> None:
    """Return for a file of plain floats; raise DataError, naming the container, for a quantised one.

    Call it before ``arch.recognise``: packed weights have other shapes than the model's.
    """
    found = quantised_container(tensors, metadata, config)
    if found is None:
        return
    container, evidence = found
    raise DataError(
        f'"{source}" is {container} ({evidence}): its scales must not be merged as weights, and this version '
        "reads BF16, FP16, FP32 and plain FP8 files; use the unquantised original."
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _leaf_in(*leaves: str) -> Callable[[str], bool]:
    wanted = frozenset(leaves)
    return lambda name: _leaf(name) in wanted


# In the order of decision: comfy_quant is the only thing that tells ComfyUI's per-layer scales from BFL's.
_BY_NAME: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (
        "a bitsandbytes file",
        lambda name: ".quant_state.bitsandbytes__" in name or _leaf(name) in _BITSANDBYTES,
    ),
    ("a nunchaku SVDQuant file", _leaf_in(*_SVDQUANT)),
    ("a ComfyUI mixed-precision file", _leaf_in("comfy_quant", *_CODEBOOK)),
    ("a ComfyUI scaled-FP8 file", _leaf_in(*_SCALED_FP8)),
    ("a BFL-style file with per-layer scales", _leaf_in(*_PER_LAYER)),
)


def _quantised_layer(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> str | None:
    """The first layer that ``_quantization_metadata`` is right about; None when it is absent or stale.

    The entry survives in files that were converted back to BF16; those are plain. One that cannot be read
    counts as quantised, since nothing says otherwise.
    """
    text = metadata.get("_quantization_metadata")
    if text is None:
        return None
    try:
        layers = list(json.loads(text)["layers"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return "which cannot be read"
    for layer in layers:
        info = tensors.get(f"{layer}.weight")
        if info is not None and info.dtype.bits <= 8:
            return f"layer {quoted(layer)}"
    return None


def _config_method(config: Mapping[str, Any] | None) -> str | None:
    """The ``quant_method`` of a config's ``quantization_config``; None where it has none."""
    entry = (config or {}).get("quantization_config")
    if not entry:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else None
    return method if isinstance(method, str) and method.isprintable() and len(method) <= 40 else "quantised"


def _packed(info: TensorInfo) -> bool:
    return info.dtype.bits <= 8 and info.dtype.kind != "bool" and not info.dtype.blendable
