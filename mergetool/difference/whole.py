"""Differences that are stored whole: the second file, for ComfyUI alone.

ComfyUI adds ``diffusion_model.MODULE.diff`` to a module's weight and ``.diff_b`` to its bias, under its own names, q, k and v fused.
diffusers rejects a file with such a key, so that they never stand in the file of the factors. Both files are loaded, each at
strength 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.adapters.formats import FORMATS, bare
from mergetool.arch import Anatomy
from mergetool.arch.encoders import is_encoder
from mergetool.difference.operands import Operand
from mergetool.difference.pairs import Pair
from mergetool.errors import NonFiniteError
from mergetool.lowrank.matrices import Dense
from mergetool.lowrank.norms import squared_norm


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """One difference, stored whole: ``values`` [shape of the part].

    ``energy`` is of the difference, ``residual`` of its rounding.
    """

    name: str
    values: Tensor
    energy: float
    residual: float


def whole(pair: Pair, delta: Operand, energy: float, dtype: torch.dtype) -> Whole:
    """``delta`` of ``pair`` rounded once to ``dtype``. Raises NonFiniteError where a value does not fit."""
    exact = delta.matrix if isinstance(delta, Dense) else delta.dense()
    values = exact.to(dtype, copy=True)  # ``exact`` may lie in a buffer that is used again
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(
            f'the difference of tensor "{pair.name}" is too large for {str(dtype).removeprefix("torch.")}: its largest value is '
            f"{float(exact.abs().max()):.3g}; store the LoRA in bf16 or fp32."
        )
    missed = squared_norm(values.double().sub_(exact))
    return Whole(pair.name, values.reshape(pair.base.shape), energy, (missed / energy) ** 0.5)


def tensors(found: Mapping[str, Whole], model: Anatomy) -> dict[str, Tensor]:
    """The file's tensors, in the family's order, by ComfyUI's names.

    Rows of a fused tensor that are not in ``found`` are zeros.
    """
    family = model.family
    layout = "comfyui" if "comfyui" in family.layouts else family.layouts[0]
    stored = family.held(model.parts, layout)
    return {
        key_of(tensor): torch.cat([_rows(found, name, names, model) for name in names])
        for tensor, names in stored.items()
        if not found.keys().isdisjoint(names)
    }


def key_of(tensor: str) -> str:
    """The key of the difference of a stored weight or bias.

    Example: ``layers.0.attention.qkv.weight`` gives ``diffusion_model.layers.0.attention.qkv.diff``, a ``.bias`` a ``.diff_b``.
    """
    module, _, leaf = bare(tensor).rpartition(".")
    role = "diff_b" if leaf == "bias" else "diff"
    return f"{module}.{role}" if is_encoder(tensor) else FORMATS["comfyui"].key(module, "full", role)


def _rows(found: Mapping[str, Whole], name: str, together: Sequence[str], model: Anatomy) -> Tensor:
    if name in found:
        return found[name].values
    like = next(found[other].values for other in together if other in found)
    return torch.zeros(model.parts[name].shape, dtype=like.dtype)
