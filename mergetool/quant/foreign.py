"""Recognise containers that are not read, and codes that nothing in the file explains.

A weight of 8 bits or fewer is only believed to be what it looks like when all that lies beside it is understood: a scale that went unnoticed would
make noise of the model, without a word.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from mergetool.checkpoint.header import TensorInfo
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError
from mergetool.quant import register
from mergetool.quant.spellings import BESIDE_CODES, current, leaf_of

WAY_OUT = f"use the unquantised original, a GGUF of the model, or a file in one of ComfyUI's containers ({', '.join(register.names())})"

CONFIG = "quantization_config"
"""The key of a config.json that says how the weights beside it are quantised."""

READ_BY_TENSORS = frozenset({"fp8", "bitsandbytes", "fbgemm_fp8", "compressed-tensors", "modelopt"})
"""Methods of a ``quantization_config`` whose tensors say all that is needed, or give the file away."""

_FORMATS: tuple[tuple[str, frozenset[str]], ...] = (
    ("a DFloat11 (DF11) file", frozenset({"encoded_exponent", "sign_mantissa"})),
    ("an HQQ file", frozenset({"W_q"})),
    ("a quanto file", frozenset({"_data", "_scale", "_shift"})),
    (
        "a torchao file",
        frozenset({"tensor_data", "qdata", "int_data", "_weight_qdata", "weight:qdata", "weight:_data"}),
    ),
    (
        "a nunchaku SVDQuant file",
        frozenset({"wscales", "wzeros", "wcscales", "wtscale", "smooth_factor_orig"}),
    ),
    ("a GPTQ or AWQ file", frozenset({"qweight", "qzeros", "g_idx"})),
    ("an SDNQ file", frozenset({"svd_up", "svd_down"})),
    ("a compressed-tensors file of packed weights", frozenset({"weight_packed", "weight_g_idx"})),
)
"""Containers and the last components of their tensors' names. The first that fits counts: several store a "qweight"."""

_PLACE = {leaf: i for i, (_, leaves) in enumerate(_FORMATS) for leaf in leaves}
_TORCHAO = ".tensor_impl."  # within a name
_SDNQ = "zero_point"  # beside integers and a scale
_PLAIN = re.compile(r"weight|.*bias|running_mean|running_var|num_batches_tracked")


def recognised(model: Mapping[str, TensorInfo], config: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """The name of a container that is not read, and its proof; None for every other file."""
    method = method_of(config)
    read = next((one for one in register.every() if one.method and one.method == method), None)
    found = min(((i, name) for name in model if (i := _place(name)) is not None), default=None)
    if found is not None and not (read and leaf_of(found[1]) in read.beside_codes):
        return _FORMATS[found[0]][0], f"tensor {quoted(found[1])}"
    if read is not None:
        unread = read.unread(entry_of(config))
        return None if unread is None else (f"{read.title} with {unread}", f"{CONFIG} in config.json")
    if method is None or method in READ_BY_TENSORS:
        return None
    return f"a {method} file", f"{CONFIG} in config.json"


def refusal(source: str, container: str, evidence: str) -> DataError:
    """The sentence for a file in a container that is not read."""
    return DataError(f'"{source}" is {container} ({evidence}), which is not read here; {WAY_OUT}.')


def require_understood(model: Mapping[str, TensorInfo], understood: Collection[str], source: str) -> None:
    """Raise DataError for codes that cannot be read, or may mean something else.

    A tensor beside them may change their meaning.

    ``understood`` are the stored tensors whose part in a quantised weight, or in no weight, is known.
    """
    narrow = [name for name, info in model.items() if is_narrow(info) and name not in understood]
    if not narrow:
        return
    children: dict[str, list[str]] = {}
    for name in model:
        children.setdefault(name.rpartition(".")[0], []).append(name)
    for name in narrow:
        parent, _, leaf = name.rpartition(".")
        beside = [other for other in children[parent] if other != name and other not in understood]
        beside.sort(key=lambda other: leaf_of(other) != _SDNQ)
        within = [other for other in children.get(name, ()) if other not in understood]
        strange = _strange(leaf, parent, model, name, beside, within)
        if strange is not None:
            raise _not_understood(source, name, model[name], strange)
        if leaf == "weight" and not model[name].dtype.blendable:
            raise refusal(source, f"a file of packed {model[name].dtype.code} weights", f"tensor {quoted(name)}")


def is_narrow(info: TensorInfo) -> bool:
    """Whether a tensor may be codes: more than one element of at most 8 bits, booleans apart."""
    return info.dtype.bits <= 8 and info.dtype.kind != "bool" and info.numel > 1


def _strange(
    leaf: str, parent: str, model: Mapping[str, TensorInfo], name: str, beside: Iterable[str], within: Iterable[str]
) -> str | None:
    """A tensor beside codes that is not understood; None where all are."""
    info = model[name]
    if leaf == "weight":
        return next((n for n in (*within, *beside) if not _PLAIN.fullmatch(leaf_of(n))), None)
    is_list = len(info.shape) < 2
    related = [*within, *(n for n in beside if leaf_of(n).startswith(leaf) or (_is_side(leaf_of(n)) and not is_list))]
    if related:
        return related[0]
    if info.dtype.blendable or not parent:
        return None
    if is_list and (info.dtype.kind not in ("int", "uint") or f"{parent}.weight" in model):
        return None
    # Integers beside a list are another list.
    tables = (n for n in beside if not is_list or model[n].dtype.kind == "float")
    return next((n for n in tables if not _PLAIN.fullmatch(leaf_of(n))), None)


def _is_side(leaf: str) -> bool:
    return current(leaf) is not None or leaf in BESIDE_CODES


def _place(name: str) -> int | None:
    """The index of the entry of `_FORMATS` that a tensor gives away."""
    place = _PLACE.get(leaf_of(name))
    return _PLACE["tensor_data"] if place is None and _TORCHAO in name else place


def _not_understood(source: str, name: str, info: TensorInfo, strange: str) -> DataError:
    if leaf_of(strange) == _SDNQ:
        return refusal(source, "an SDNQ file", f"tensor {quoted(strange)}")
    return DataError(
        f'"{source}": tensor {quoted(name)} is {info.dtype.code} beside {quoted(strange)}, which may say what its codes mean and '
        f"is not understood here; {WAY_OUT}."
    )


def entry_of(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The ``quantization_config`` of a config.json; empty where it has none that can be read."""
    entry = (config or {}).get(CONFIG)
    return entry if isinstance(entry, Mapping) else {}


def method_of(config: Mapping[str, Any] | None) -> str | None:
    """The ``quant_method`` of a config's ``quantization_config``; None where it has none."""
    if not (config or {}).get(CONFIG):
        return None
    method = entry_of(config).get("quant_method")
    return method if isinstance(method, str) and method.isprintable() and len(method) <= 40 else "quantised"
