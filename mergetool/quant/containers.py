"""From a file's header to its quantised weights: which container each is in, or why the file is refused.

Nothing is guessed: a weight is read when its tensors, their dtypes and shapes and everything the file says about it agree, and refused in one
sentence when they do not. Only the small JSON tensors ``.comfy_quant`` are read besides the header.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mergetool.checkpoint import strict_json
from mergetool.checkpoint.dtypes import BY_CODE, F8_E4M3, F8_E5M2
from mergetool.checkpoint.gguf import Packed
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.quant import gguf, int8, mxfp8, nvfp4, scaled_fp8
from mergetool.quant.encoding import Encoding, Layer

METADATA = "_quantization_metadata"
MARKER = "comfy_quant"
MOST_MARKER_BYTES = 65536

CURRENT_NAMES: Mapping[str, str] = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
_SCALES = frozenset({"weight_scale", "weight_scale_2", "pre_quant_scale"})
_LAYER_LEAVES = frozenset({*CURRENT_NAMES, *_SCALES, "input_scale", MARKER})
_CODEBOOK = frozenset({"weight_s_rel", "weight_s_channel", "weight_codebook", "weight_zeros"})
_BITSANDBYTES = frozenset({"SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map"})
_SVDQUANT = frozenset({"qweight", "wscales", "wzeros", "wcscales", "wtscale", "smooth_factor", "smooth_factor_orig"})
_SIDE = _LAYER_LEAVES | _CODEBOOK | _BITSANDBYTES | _SVDQUANT | {"scaled_fp8"}

# Where an all-in-one checkpoint keeps its diffusion model. Its bundled text encoder may be quantised: that
# part is copied with its scales, bit for bit, and concerns nobody here.
_BUNDLED_MODEL = "model.diffusion_model."

_BY_FORMAT: Mapping[str, Callable[[Layer], Encoding]] = {
    **dict.fromkeys(scaled_fp8.FORMATS, scaled_fp8.encoding_of),
    "nvfp4": nvfp4.encoding_of,
    "mxfp8": mxfp8.encoding_of,
    "int8_tensorwise": int8.encoding_of,
}
_REFUSED: tuple[tuple[str, frozenset[str]], ...] = (
    ("a bitsandbytes file", _BITSANDBYTES),
    ("a nunchaku SVDQuant file", _SVDQUANT),
    ("a ComfyUI file of 4-bit codebook weights (W4A8, AWQ)", _CODEBOOK),
)


def is_side_tensor(name: str) -> bool:
    """True for a tensor that only means something beside a quantised weight: a marker, a scale, a codebook."""
    return _leaf(name) in _SIDE or ".quant_state.bitsandbytes__" in name


def refused_container(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """The name of a container that is not read, and what shows it; None for every other file.

    ``tensors`` come from the header, ``config`` from config.json where there is one.
    """
    model = _model_of(tensors)
    for container, leaves in _REFUSED:
        for name in model:
            if _leaf(name) in leaves or (leaves is _BITSANDBYTES and ".quant_state.bitsandbytes__" in name):
                return container, f"tensor {quoted(name)}"
    method = _config_method(config)
    return None if method is None else (f"a {method} file", "quantization_config in config.json")


def encodings_of(checkpoint: Checkpoint, source: str) -> dict[str, Encoding]:
    """Every quantised weight of an open checkpoint; see `encodings`."""
    return encodings(
        checkpoint.tensors,
        checkpoint.metadata,
        checkpoint.config,
        read=checkpoint.read,
        packed=checkpoint.packed,
        source=source,
    )


def encodings(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    *,
    read: Callable[[str], bytes],
    packed: Mapping[str, Packed],
    source: str,
) -> dict[str, Encoding]:
    """Every quantised weight of a file, by the name of its stored weight; empty for plain floats (raw FP8 casts included).

    ``read`` gives the bytes of a small tensor, ``packed`` the block types of a GGUF file; ``source`` names the file in messages. In an
    all-in-one checkpoint only the diffusion model is looked at. Raises DataError, with a way out, for a container that is not read and
    for a file that contradicts itself.
    """
    refused = refused_container(tensors, config)
    if refused is not None:
        raise _refusal(source, *refused)
    if packed:
        return {name: gguf.encoding_of(name, packed[name], source) for name in tensors if name in packed}
    model = _model_of(tensors)
    said = _said(model, metadata, read, source)
    old = {name: info for name, info in model.items() if _leaf(name) == "scaled_fp8"}
    found: dict[str, Encoding] = {}
    for name, sides in _layers(model, source).items():
        encoding = _encoding(name, sides, model, said.get(name), old, source)
        if encoding is not None:
            found[encoding.tensor] = encoding
    for name, info in model.items():
        if name not in found and name.endswith(".weight") and len(info.shape) >= 2 and _packed(info):
            raise _refusal(source, f"a file of packed {info.dtype.code} weights", f"tensor {quoted(name)}")
    return found


def _encoding(
    name: str,
    sides: Mapping[str, tuple[str, TensorInfo]],
    model: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    old: Mapping[str, TensorInfo],
    source: str,
) -> Encoding | None:
    """What one layer is; None for a plain weight, beside which there may be the scale of its input."""
    weight = model.get(f"{name}.weight")
    if config is None and not _SCALES & sides.keys():
        return None
    if weight is None:
        raise DataError(
            f'"{source}": {quoted(next(iter(sides.values()))[0] if sides else name)} belongs to "{name}.weight", which is not '
            "in the file; download it again, or use the unquantised original."
        )
    layer = Layer(source, name, weight, sides, config)
    if "weight_scale_2" in sides and weight.dtype is not BY_CODE["U8"]:
        layer.refuse(f'has a weight of {weight.dtype.code} and a "weight_scale_2"', "U8, as nvfp4 is,")
    if config is not None:
        form = config.get("format")
        if not isinstance(form, str) or form not in _BY_FORMAT:
            raise _refusal(source, f"a ComfyUI file of the format {quoted(str(form)[:40])}", f"layer {quoted(name)}")
        if form != "int8_tensorwise" and int8.rotation(layer) is not None:
            # ComfyUI would not undo it; programs that make such files do.
            layer.refuse('has the key "convrot"', "a format that knows rotations (int8_tensorwise)")
        return _BY_FORMAT[form](layer)
    if weight.dtype in (F8_E4M3, F8_E5M2):
        for marker, info in old.items():
            if info.dtype in (F8_E4M3, F8_E5M2) and info.dtype is not weight.dtype:
                layer.refuse(
                    f"has a weight of {weight.dtype.code}", f"{info.dtype.code}, the dtype of {quoted(marker)},"
                )
        return scaled_fp8.encoding_of(layer)
    if weight.dtype is BY_CODE["U8"] and "weight_scale_2" in sides:
        return nvfp4.encoding_of(layer)
    if weight.dtype is BY_CODE["I8"]:
        layer.refuse("has integers and a scale but no marker", 'a ".comfy_quant" that says whether they are rotated')
    return layer.refuse(
        f"has a weight of {weight.dtype.code} beside {quoted(next(sides[leaf][0] for leaf in sides if leaf in _SCALES))}",
        "a quantised weight",
    )


def _model_of(tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    return {name: info for name, info in tensors.items() if name.startswith(_BUNDLED_MODEL)} or tensors


def _layers(model: Mapping[str, TensorInfo], source: str) -> dict[str, dict[str, tuple[str, TensorInfo]]]:
    """Module name -> last component, under its current name -> stored name and TensorInfo, for all side tensors."""
    layers: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    for stored, info in model.items():
        leaf = _leaf(stored)
        if leaf not in _LAYER_LEAVES:
            continue
        name = stored.removesuffix(leaf).removesuffix(".").removesuffix(".weight")
        sides = layers.setdefault(name, {})
        current = CURRENT_NAMES.get(leaf, leaf)
        if current in sides:
            raise DataError(
                f'"{source}": tensors {quoted(sides[current][0])} and {quoted(stored)} both scale layer {quoted(name)}, '
                "where one is wanted; the file is damaged: use the unquantised original."
            )
        sides[current] = (stored, info)
    return layers


def _said(
    model: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], bytes], source: str
) -> dict[str, Mapping[str, Any]]:
    """What the file says about its layers: the JSON in ``.comfy_quant`` tensors and ``_quantization_metadata``, which must agree.

    The metadata survives in files that were converted back to floats; an entry for a plain weight is stale and counts for nothing.
    """
    said: dict[str, Mapping[str, Any]] = {}
    for stored, info in model.items():
        if _leaf(stored) == MARKER:
            said[stored.removesuffix(MARKER).removesuffix(".")] = _marker(stored, info, read, source)
    for entry, config in _metadata_layers(metadata, source).items():
        name = next((n for n in (entry, _BUNDLED_MODEL + entry) if f"{n}.weight" in model), None)
        stale = name is None or (model[f"{name}.weight"].dtype.bits > 8 and f"{name}.weight_scale" not in model)
        if name is None or stale:
            continue
        if name in said and any(said[name].get(key) != config.get(key) for key in ("format", "convrot")):
            raise DataError(
                f'"{source}": layer {quoted(name)} is {quoted(str(said[name].get("format"))[:40])} by its marker and '
                f"{quoted(str(config.get('format'))[:40])} by {METADATA}, where both should say the same; "
                "use the unquantised original."
            )
        said.setdefault(name, config)
    return said


def _marker(stored: str, info: TensorInfo, read: Callable[[str], bytes], source: str) -> Mapping[str, Any]:
    if info.dtype is BY_CODE["U8"] and len(info.shape) == 1 and info.nbytes <= MOST_MARKER_BYTES:
        try:
            config = strict_json.loads(read(stored))
        except ValueError:
            config = None
        if isinstance(config, dict):
            return config
    raise DataError(
        f'"{source}": {quoted(stored)} is {info.dtype.code} {list(info.shape)} and no JSON object in bytes, which says how the '
        "layer is quantised; use the unquantised original."
    )


def _metadata_layers(metadata: Mapping[str, str], source: str) -> dict[str, Mapping[str, Any]]:
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        layers = strict_json.loads(text.encode("utf-8", "surrogatepass"))["layers"]
        found = {name: {"format": value} if isinstance(value, str) else value for name, value in layers.items()}
        if not all(isinstance(value, dict) for value in found.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(
            f'"{source}" has metadata {METADATA}, which cannot be read, so nothing says how it is quantised; '
            "use the unquantised original."
        ) from None
    return found


def _refusal(source: str, container: str, evidence: str) -> DataError:
    return DataError(
        f'"{source}" is {container} ({evidence}), which is not read here; use the unquantised original, or a ComfyUI FP8, '
        "int8, nvfp4 or mxfp8 file or a GGUF of the model."
    )


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _config_method(config: Mapping[str, Any] | None) -> str | None:
    """The ``quant_method`` of a config's ``quantization_config``; None where it has none."""
    entry = (config or {}).get("quantization_config")
    if not entry:
        return None
    method = entry.get("quant_method") if isinstance(entry, Mapping) else None
    return method if isinstance(method, str) and method.isprintable() and len(method) <= 40 else "quantised"


def _packed(info: TensorInfo) -> bool:
    return info.dtype.bits <= 8 and info.dtype.kind != "bool" and not info.dtype.blendable
