"""How programs spell what lies beside a quantised weight: one table of the last components of tensor names.

Every scale here is one to multiply by: value = code * scale. That holds for DeepSeek's and Qwen's ``weight_scale_inv`` too, whatever its name says
(https://huggingface.co/Qwen/Qwen3-8B-FP8), and in files of the FP8 Flux programs ``scale_reciprocal`` is the factor and ``scale`` its inverse.
"""

from __future__ import annotations

from collections.abc import Mapping

MARKER = "comfy_quant"
SCALE, INPUT_SCALE = "weight_scale", "input_scale"

CURRENT: Mapping[str, str] = {
    **dict.fromkeys((SCALE, "scale_weight", "weight_scale_inv"), SCALE),
    **dict.fromkeys((INPUT_SCALE, "scale_input", "input_scale_reciprocal", "input_scale_inv"), INPUT_SCALE),
    **{leaf: leaf for leaf in ("weight_scale_2", "pre_quant_scale", MARKER)},
}
"""Last component -> its current name, for those that mean nothing but this."""

BESIDE_CODES: Mapping[str, str] = {
    **dict.fromkeys(("scale", "scale_reciprocal", "weight_scale_reciprocal", "scale_inv", "dequant_scale"), SCALE),
    **dict.fromkeys(("act_scale", "activation_scale"), INPUT_SCALE),
}
"""The same for names that also have other meanings (a norm's ``scale``): they count beside a weight of 8 bits only."""

DIVISOR = "scale"
RECIPROCALS = frozenset({"scale_reciprocal", "weight_scale_reciprocal"})
"""A ``scale`` is the inverse of the factor where one of these lies beside it."""

COMFYUI: Mapping[str, str] = {
    **{leaf: CURRENT[leaf] for leaf in (SCALE, "scale_weight", INPUT_SCALE, "scale_input")},
    **{leaf: leaf for leaf in ("weight_scale_2", "pre_quant_scale", MARKER)},
}
"""Those of ComfyUI's own files, old and new, whose values mean there what they mean here."""

SCALES = frozenset({SCALE, "weight_scale_2", "pre_quant_scale"})


def leaf_of(name: str) -> str:
    """The last component of a tensor's name."""
    return name.rpartition(".")[2]


def module_of(stored: str) -> str:
    """The module that a side tensor belongs to: ``a`` of ``a.weight_scale`` and of ``a.weight.scale``."""
    return stored.rpartition(".")[0].removesuffix(".weight")
