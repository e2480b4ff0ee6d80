"""The spellings of tensors beside a quantised weight. It is one table of the last components of their names.

Every scale here is one to multiply by: value = code * scale. That holds for DeepSeek's and Qwen's ``weight_scale_inv`` too, whatever its name says
(https://huggingface.co/Qwen/Qwen3-8B-FP8), and in files of the FP8 Flux programs ``scale_reciprocal`` is the factor and ``scale`` its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergetool.quant import register

MARKER = "comfy_quant"
SCALE, INPUT_SCALE = "weight_scale", "input_scale"

_CURRENT: Mapping[str, str] = {
    **dict.fromkeys((SCALE, "scale_weight", "weight_scale_inv"), SCALE),
    **dict.fromkeys((INPUT_SCALE, "scale_input", "input_scale_reciprocal", "input_scale_inv"), INPUT_SCALE),
    **{leaf: leaf for leaf in ("pre_quant_scale", MARKER)},
}

BESIDE_CODES: Mapping[str, str] = {
    **dict.fromkeys(("scale", "scale_reciprocal", "weight_scale_reciprocal", "scale_inv", "dequant_scale"), SCALE),
    **dict.fromkeys(("act_scale", "activation_scale"), INPUT_SCALE),
}
"""The same for names that also have other meanings (a norm's ``scale``): they count beside a weight of 8 bits only."""

DIVISOR = "scale"
RECIPROCALS = frozenset({"scale_reciprocal", "weight_scale_reciprocal"})
"""A ``scale`` is the inverse of the factor where one of these lies beside it."""

_IN_COMFYUI = (SCALE, "scale_weight", INPUT_SCALE, "scale_input", "pre_quant_scale", MARKER)


def current(leaf: str) -> str | None:
    """The current name of a last component that can only be a scale or marker. None for every other."""
    return leaf if leaf in register.scales() else _CURRENT.get(leaf)


def in_comfyui(leaf: str) -> str | None:
    """The same for components in ComfyUI's own files, old and new. Their values have the same meaning there."""
    return current(leaf) if leaf in _IN_COMFYUI or leaf in register.scales() else None


def scales() -> frozenset[str]:
    """The current names of the scales of a weight."""
    return register.scales() | {SCALE, "pre_quant_scale"}


def beside_codes(method: str) -> Mapping[str, str]:
    """The current names of components that count beside codes only, in files of a ``method``."""
    return {**BESIDE_CODES, **register.beside_codes(method)}


def leaf_of(name: str) -> str:
    """The last component of a tensor's name."""
    return name.rpartition(".")[2]


def module_of(stored: str) -> str:
    """The module of a side tensor: ``a`` of ``a.weight_scale`` and of ``a.weight.scale``."""
    components = stored.split(".")[:-1]
    while components and components[-1] in register.between():
        components.pop()
    return ".".join(components).removesuffix(".weight")
