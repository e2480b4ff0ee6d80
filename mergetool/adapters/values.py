"""The values of a change, in float32: as two factors, or row by row."""

from __future__ import annotations

from math import prod

import numpy as np

from mergetool.adapters.adapter import Change
from mergetool.adapters.lora_file import LoraFile
from mergetool.arch.encoders import is_transposed
from mergetool.quant.encoding import Floats
from mergetool.quant.fp8 import widened


def low_rank(file: LoraFile, change: Change, *, scaled: bool = True) -> tuple[Floats, Floats] | None:
    """The change as ``up`` [rows, rank] times ``down`` [rank, columns]; None for other kinds.

    With ``scaled`` the scale is in ``up``: multiplied in float64, rounded once. A convolution's columns are its in * kh * kw.
    """
    adapter = change.adapter
    if adapter.kind != "lora":
        return None
    if is_transposed(change.part):
        up = factor(file, adapter.tensors["down"]).T[change.row : change.row + change.rows]
        return _scaled(up, adapter.scale if scaled else 1), np.ascontiguousarray(factor(file, adapter.tensors["up"]).T)
    up = factor(file, adapter.tensors["up"], change.row, change.rows).reshape(change.rows, -1)
    down = factor(file, adapter.tensors["down"])
    if "mid" in adapter.tensors:  # LoCon: down [r, in, 1, 1] behind a small convolution mid [r, r, kh, kw]
        mid = factor(file, adapter.tensors["mid"])
        down = np.einsum("pqhw,qi->pihw", mid, down.reshape(down.shape[:2]), dtype=np.float64).astype(np.float32)
    return _scaled(up, adapter.scale if scaled else 1), np.ascontiguousarray(down.reshape(len(down), -1))


def dense_rows(file: LoraFile, change: Change, first: int, count: int) -> Floats:
    """Rows ``[first, first + count)`` of a change of any kind, [count, columns].

    DoRA's magnitudes are not in them. Of a whole weight they are its own rows, of which the model's are not yet taken away.
    """
    adapter, row = change.adapter, change.row + first
    if is_transposed(change.part) and adapter.kind != "lora":
        whole = dense_rows(file, Change(adapter, "", 0, adapter.shape[0]), 0, adapter.shape[0])
        return np.ascontiguousarray(whole.T[row : row + count])
    match adapter.kind:
        case "lora":
            found = low_rank(file, Change(adapter, change.part, row, count))
            assert found is not None
            return found[0] @ found[1]
        case "full" | "whole":
            key = next(iter(adapter.tensors.values()))
            stored = file.checkpoint.tensors[key].shape
            if len(stored) > 1 and stored[0] == adapter.shape[0]:
                return _scaled(factor(file, key, row, count).reshape(count, -1), adapter.scale)
            rows = adapter.shape[0] if adapter.shape else 1  # a vector, or one that stands for a single row
            return _scaled(factor(file, key).reshape(rows, -1)[row : row + count], adapter.scale)
        case "loha":
            both = [_loha_rows(file, change, side, row, count) for side in ("1", "2")]
            return _scaled(both[0] * both[1], adapter.scale)
        case "lokr":
            return _scaled(_lokr_rows(file, change, row, count), adapter.scale)


def factor(file: LoraFile, key: str, row: int = 0, rows: int | None = None) -> Floats:
    """Rows of a stored tensor, all without ``rows``, widened exactly."""
    info = file.checkpoint.tensors[key]
    count = (info.shape[0] if info.shape else 1) if rows is None else rows
    width = prod(info.shape[1:])
    size = width * info.dtype.bits // 8
    raw = file.checkpoint.read(key, row * size, count * size)
    return widened(memoryview(raw), info.dtype).reshape(count, *info.shape[1:])


def _scaled(values: Floats, scale: float) -> Floats:
    return values if scale == 1 else (values * np.float64(scale)).astype(np.float32)


def _loha_rows(file: LoraFile, change: Change, side: str, row: int, count: int) -> Floats:
    tensors = change.adapter.tensors
    if f"t{side}" not in tensors:
        left = factor(file, tensors[f"w{side}_a"], row, count)
        right: Floats = left @ factor(file, tensors[f"w{side}_b"])
        return right
    left = factor(file, tensors[f"w{side}_a"])[:, row : row + count]
    whole = _tucker(factor(file, tensors[f"t{side}"]), left, factor(file, tensors[f"w{side}_b"]))
    return whole.reshape(count, -1)


def _lokr_rows(file: LoraFile, change: Change, row: int, count: int) -> Floats:
    """Row a * m + b of a Kronecker product, m the rows of the second: row a of the first times row b of the second."""
    tensors = change.adapter.tensors
    first = factor(file, tensors["w1"]) if "w1" in tensors else _times(file, tensors["w1_a"], tensors["w1_b"])
    if "w2" in tensors:
        second = factor(file, tensors["w2"])
    elif "t2" in tensors:
        second = _tucker(factor(file, tensors["t2"]), factor(file, tensors["w2_a"]), factor(file, tensors["w2_b"]))
    else:
        second = _times(file, tensors["w2_a"], tensors["w2_b"])
    rows = np.arange(row, row + count)
    left, right = first[rows // len(second)], second[rows % len(second)].reshape(count, second.shape[1], -1)
    product: Floats = (left[:, :, None, None] * right[:, None]).reshape(count, -1)
    return product


def _times(file: LoraFile, up: str, down: str) -> Floats:
    right = factor(file, down)
    product: Floats = (factor(file, up) @ right.reshape(len(right), -1)).reshape(-1, *right.shape[1:])
    return product


def _tucker(core: Floats, left: Floats, right: Floats) -> Floats:
    """LyCORIS: core [p, q, kh, kw], left [p, out], right [q, in] -> [out, in, kh, kw]."""
    whole: Floats = np.einsum("pqhw,po,qi->oihw", core, left, right, dtype=np.float64).astype(np.float32)
    return whole
