"""Find the quantised weights of a file by its header: each one's container, or a refusal.

Nothing is guessed: a weight is read when its tensors, their dtypes and shapes and everything the file says about it agree, and refused in one
sentence when they do not. Only the small JSON tensors ``.comfy_quant`` are read besides the header.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergetool.checkpoint import strict_json
from mergetool.checkpoint.dtypes import BY_CODE, F8_E4M3, F8_E5M2
from mergetool.checkpoint.gguf import Packed
from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.quant import foreign, gguf, register, scales, spellings
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import Encoding, Layer
from mergetool.quant.foreign import is_narrow, refusal
from mergetool.quant.spellings import (
    BESIDE_CODES,
    DIVISOR,
    INPUT_SCALE,
    MARKER,
    RECIPROCALS,
    beside_codes,
    current,
    leaf_of,
    module_of,
)

METADATA = "_quantization_metadata"
MOST_MARKER_BYTES = 65536

_MODEL_PREFIX = "model.diffusion_model."  # that metadata may leave out
_OLD_MARKER = "scaled_fp8"


def is_side_tensor(name: str) -> bool:
    """Whether a tensor's name alone makes it a marker or a scale of a quantised weight."""
    return current(leaf_of(name)) is not None or leaf_of(name) == _OLD_MARKER


def side_tensors(names: Iterable[str], encodings: Mapping[str, Encoding]) -> frozenset[str]:
    """The tensors of a file that are not parameters.

    They are those that ``encodings`` have beside their weights, and stray markers and scales.
    """
    beside = {tensor for encoding in encodings.values() for tensor in encoding.beside}
    return frozenset(name for name in names if name in beside or is_side_tensor(name))


@dataclass(frozen=True, slots=True)
class Quantised:
    """The quantised part of a checkpoint: ``encodings`` by stored weight, and ``notes``.

    The notes are words that follow the file's name.
    """

    encodings: Mapping[str, Encoding]
    notes: tuple[str, ...] = ()


def quantised(checkpoint: Checkpoint, source: str, bundled: Collection[str] = ()) -> Quantised:
    """Find the quantised weights of an open checkpoint; see `encodings`.

    Scales that are plain floats are read, and those of 0 noted.

    Raises DataError for what `encodings` does, and for a scale of NaN or infinity.
    """
    tensors = checkpoint.tensors
    found = encodings(
        tensors,
        checkpoint.metadata,
        checkpoint.config,
        read=checkpoint.read,
        packed=checkpoint.packed,
        source=source,
        bundled=bundled,
    )
    notes = scales.notes(found.values(), checkpoint.read, source)
    lost = [name for name in tensors if name not in bundled and _is_lonely(name, tensors, found)]
    if lost:
        notes += (
            f"has FP8 weights beside the scale of an input and none of their own ({quoted(min(lost))}, {len(lost)} in all): "
            "they are read as plain FP8",
        )
    return Quantised(found, notes)


def _is_lonely(side: str, tensors: Mapping[str, TensorInfo], found: Mapping[str, Encoding]) -> bool:
    """Whether a tensor is the input scale of FP8 that has no scale itself."""
    weight = f"{module_of(side)}.weight"
    scales_input = current(leaf_of(side)) == INPUT_SCALE
    return scales_input and weight in tensors and weight not in found and is_narrow(tensors[weight])


def encodings(
    tensors: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    config: Mapping[str, Any] | None,
    *,
    read: Callable[[str], bytes],
    packed: Mapping[str, Packed],
    source: str,
    bundled: Collection[str] = (),
) -> dict[str, Encoding]:
    """Every quantised weight of a file, by stored name; empty for plain floats. Raw FP8 casts are plain floats.

    ``read`` gives the bytes of a small tensor, ``packed`` the block types of a GGUF file; ``source`` names the file in messages. What is
    ``bundled`` with the model may be quantised as it likes: it is copied with its scales, bit for bit, and nothing is said of it; GGUF blocks
    are read wherever they are. Raises DataError, with a way out, for a container that is not read, for a file that contradicts itself, and for codes
    beside something that is not understood.
    """
    model = {name: info for name, info in tensors.items() if name not in bundled} if bundled else tensors
    refused = foreign.recognised(model, config)
    if refused is not None:
        raise refusal(source, *refused)
    if packed:
        return {name: gguf.encoding_of(name, packed[name], source) for name in tensors if name in packed}
    said = _said(model, metadata, read, source)
    old = {name: info for name, info in model.items() if leaf_of(name) == _OLD_MARKER}
    blocks, entry = _block_size(config), foreign.entry_of(config)
    found: dict[str, Encoding] = {}
    understood = set(old)
    for name, sides in _layers(model, foreign.method_of(config) or "", source).items():
        understood |= {stored for stored, _ in sides.values()}
        if name not in said and not spellings.scales() & sides.keys():
            continue  # a plain weight, beside which there may be the scale of its input
        if f"{name}.weight" not in model:
            raise _orphan(source, next(iter(sides.values()))[0] if sides else name, name)
        layer = Layer(source, name, model[f"{name}.weight"], sides, said.get(name), blocks, read, entry)
        found[layer.tensor] = _encoding(layer, old)
        understood.add(layer.tensor)
    foreign.require_understood(model, understood, source)
    return found


def _orphan(source: str, side: str, name: str) -> DataError:
    return DataError(
        f'"{source}": {quoted(side)} belongs to "{name}.weight", which is not in the file; download it again, or use the '
        "unquantised original."
    )


def _encoding(layer: Layer, old: Mapping[str, TensorInfo]) -> Encoding:
    """The encoding of one layer; ``old`` are the old markers of the file."""
    weight, sides = layer.weight, layer.sides
    container = _container(layer)
    for other in register.every():
        if other is not container and (strange := min(other.scales & sides.keys(), default=None)):
            layer.refuse(f"has a weight of {weight.dtype.code} and a {quoted(strange)}", f"one of {other.title}")
    if container is None and weight.dtype is BY_CODE["I8"]:
        layer.refuse("has integers and a scale but no marker", 'a ".comfy_quant" that says whether they are rotated')
    if container is None:
        layer.refuse(
            f"has a weight of {weight.dtype.code} beside {quoted(next(sides[leaf][0] for leaf in sides if leaf in spellings.scales()))}",
            "a quantised weight",
        )
    if layer.config is None and weight.dtype in (F8_E4M3, F8_E5M2):
        for marker, info in old.items():
            if info.dtype in (F8_E4M3, F8_E5M2) and info.dtype is not weight.dtype:
                layer.refuse(
                    f"has a weight of {weight.dtype.code}", f"{info.dtype.code}, the dtype of {quoted(marker)},"
                )
    return container.read(layer)


def _container(layer: Layer) -> Dequantiser | None:
    """The container that a layer is in, by its marker or else by its tensors; None where it is in none.

    Raises DataError for a marker that speaks of another format, or of a rotation where there can be none.
    """
    if layer.config is None:
        return next((one for one in register.every() if one.claims(layer)), None)
    form = layer.config.get("format")
    container = next((one for one in register.every() if form in one.formats), None)
    if container is None:
        raise refusal(
            layer.source, f"a ComfyUI file of the format {quoted(str(form)[:40])}", f"layer {quoted(layer.name)}"
        )
    if not container.rotates and layer.rotation() is not None:
        # ComfyUI would not undo it; programs that make such files do.
        rotating = ", ".join(form for one in register.every() if one.rotates for form in one.formats)
        layer.refuse('has the key "convrot"', f"a format that knows rotations ({rotating})")
    return container


def _layers(model: Mapping[str, TensorInfo], method: str, source: str) -> dict[str, dict[str, tuple[str, TensorInfo]]]:
    """Module name -> current name of a side tensor -> stored name and TensorInfo, for all side tensors."""
    spelled: dict[str, list[tuple[str, str, TensorInfo]]] = {}
    for stored, info in model.items():
        leaf, name = leaf_of(stored), module_of(stored)
        if current(leaf) or _is_beside_codes(leaf, model.get(f"{name}.weight"), method):
            spelled.setdefault(name, []).append((leaf, stored, info))
    layers: dict[str, dict[str, tuple[str, TensorInfo]]] = {}
    for name, found in spelled.items():
        sides = layers.setdefault(name, {})
        has_factor = any(leaf in RECIPROCALS for leaf, _, _ in found)
        for leaf, stored, info in found:
            side = DIVISOR if leaf == DIVISOR and has_factor else current(leaf) or beside_codes(method)[leaf]
            if side == INPUT_SCALE and side in sides:
                side = leaf  # a second spelling: it says nothing about the weight either
            if side in sides:
                raise DataError(
                    f'"{source}": tensors {quoted(sides[side][0])} and {quoted(stored)} both scale layer {quoted(name)}, '
                    "where one is wanted; the file is damaged: use the unquantised original."
                )
            sides[side] = (stored, info)
    return layers


def _is_beside_codes(leaf: str, weight: TensorInfo | None, method: str) -> bool:
    """Whether a tensor whose name may mean other things is beside a weight that it can belong to."""
    if weight is None or not is_narrow(weight):
        return False
    return leaf in register.beside_codes(method) or (leaf in BESIDE_CODES and weight.dtype in (F8_E4M3, F8_E5M2))


def _block_size(config: Mapping[str, Any] | None) -> tuple[int, int] | None:
    """The ``weight_block_size`` of a config's ``quantization_config``: rows and columns that share a scale."""
    size = foreign.entry_of(config).get("weight_block_size")
    if isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size):
        return size[0], size[1]
    return None


def _said(
    model: Mapping[str, TensorInfo], metadata: Mapping[str, str], read: Callable[[str], bytes], source: str
) -> dict[str, Mapping[str, Any]]:
    """The file's statements about its layers: the JSON in ``.comfy_quant`` tensors and ``_quantization_metadata``, which must agree.

    The metadata survives in files that were converted back to floats; an entry for a plain weight is stale and counts for nothing.
    """
    said: dict[str, Mapping[str, Any]] = {}
    for stored, info in model.items():
        if leaf_of(stored) == MARKER:
            said[stored.removesuffix(MARKER).removesuffix(".")] = _marker(stored, info, read, source)
    for entry, config in metadata_layers(metadata, source).items():
        name = next((n for n in (entry, _MODEL_PREFIX + entry) if f"{n}.weight" in model), None)
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


def metadata_layers(metadata: Mapping[str, str], source: str) -> dict[str, Mapping[str, Any]]:
    """Module -> its entry in ``_quantization_metadata``; empty without.

    Raises DataError for one that cannot be read.
    """
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
