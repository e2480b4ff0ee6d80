"""A LoRA file's change to one matrix, with its singular values (`lowrank.matrices`)."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from mergetool.adapters.adapter import Change
from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.values import dense_rows, factor, low_rank
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError, NonFiniteError
from mergetool.lowrank.low_rank import LowRank
from mergetool.lowrank.matrices import ROWS, Dense, Kronecker, Matrix


def source_of(file: LoraFile, change: Change) -> Matrix:
    """The values of a change of a matrix; a convolution's columns are its in * kh * kw.

    Raises DataError for a DoRA, whose change depends on the weight it is added to, and NonFiniteError for NaN or infinity.
    """
    adapter = change.adapter
    if "dora_scale" in adapter.tensors:
        raise DataError(
            f'"{file.name}": {quoted(adapter.module)} is a DoRA, whose change depends on the weight it is added to; '
            "add it to its model with `mergetool lora bake`, and take the difference with `mergetool diff`."
        )
    matrix = _structured(file, change) or Dense.of(_dense(file, change))
    if not all(bool(torch.isfinite(part).all()) for part in matrix.tensors):
        raise NonFiniteError(
            f'"{file.name}": the factors of {quoted(adapter.module)} hold NaN or infinity; mend the file, or leave it out.'
        )
    return matrix


def _dense(file: LoraFile, change: Change) -> Tensor:
    matrix = torch.empty(change.rows, prod(change.adapter.shape[1:]))
    for first in range(0, change.rows, ROWS):
        count = min(ROWS, change.rows - first)
        matrix[first : first + count] = torch.from_numpy(dense_rows(file, change, first, count))
    return matrix


def _structured(file: LoraFile, change: Change) -> LowRank | Kronecker | None:
    """The change by its factors; None for one that has no structure to use."""
    adapter = change.adapter
    match adapter.kind:
        case "lora":
            found = low_rank(file, change, scaled=False)
            assert found is not None
            up, down = (torch.from_numpy(values) for values in found)
            return LowRank.scaled(up, down, adapter.scale)
        case "loha" if "t1" not in adapter.tensors:
            left, right = _hadamard(file, change)
            return LowRank(left * adapter.scale, right)
        case "lokr":
            return _kronecker(file, change)
    return None


def _hadamard(file: LoraFile, change: Change) -> tuple[Tensor, Tensor]:
    """The factors of an element-wise product: [rows, r1 * r2] and [r1 * r2, columns]."""
    tensors = change.adapter.tensors
    ups = [_wide(factor(file, tensors[f"w{side}_a"], change.row, change.rows)) for side in "12"]
    downs = [_wide(factor(file, tensors[f"w{side}_b"])) for side in "12"]
    up = torch.einsum("mi,mj->mij", *ups).reshape(change.rows, -1)
    return up, torch.einsum("in,jn->ijn", *downs).reshape(up.shape[1], -1)


def _kronecker(file: LoraFile, change: Change) -> Kronecker | None:
    """The factors of a Kronecker product; None where the wanted rows of a fused one cut through the second, or it is a Tucker core."""
    tensors = change.adapter.tensors
    if "t2" in tensors:
        return None
    first, second = (_side(file, change, side) for side in ("w1", "w2"))
    if change.row % len(second) or change.rows % len(second):
        return None
    start = change.row // len(second)
    return Kronecker(first[start : start + change.rows // len(second)], second, change.adapter.scale)


def _side(file: LoraFile, change: Change, side: str) -> Tensor:
    """One side of a Kronecker product, whole or multiplied, a convolution's kernel among its columns."""
    tensors = change.adapter.tensors
    if side in tensors:
        whole = _wide(factor(file, tensors[side]))
        return whole.reshape(len(whole), -1)
    right = _wide(factor(file, tensors[f"{side}_b"]))
    return _wide(factor(file, tensors[f"{side}_a"])) @ right.reshape(len(right), -1)


def _wide(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> Tensor:
    return torch.from_numpy(values).double()
