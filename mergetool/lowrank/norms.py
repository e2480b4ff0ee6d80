"""Energies: squared Frobenius norms of float32 values, right to 1e-9."""

from __future__ import annotations

import torch
from torch import Tensor

_SAFE = (1e-30, 1e30)
"""Squares of values below 1e-19 vanish in float32 and above 1e19 overflow: energies outside of this are summed again, in float64."""


def squared_norm(matrix: Tensor) -> float:
    """The squared Frobenius norm, right to 1e-9. Float32 sums run over 256 values, float64 over the runs.

    One float32 sum over 4e7 values, as torch.linalg.vector_norm does it, is 0.5 % too low.
    """
    flat = matrix.reshape(-1)
    whole = flat.numel() // 256 * 256
    runs = torch.linalg.vector_norm(flat[:whole].view(-1, 256), dim=1).double().square().sum()
    return float(runs + flat[whole:].double().square().sum())


def energy(values: Tensor) -> float:
    """`squared_norm`, right for values of any size; not finite where one is not."""
    norm = squared_norm(values)
    return norm if _SAFE[0] < norm < _SAFE[1] else float(values.double().square().sum())


def energies_of(deltas: Tensor) -> list[float]:
    """The `energy` of each of ``deltas`` [B, m, n]."""
    flat = deltas.reshape(len(deltas), -1)
    whole = flat.shape[1] // 256 * 256
    runs = torch.linalg.vector_norm(flat[:, :whole].view(len(flat), -1, 256), dim=2).double().square().sum(1)
    norms: list[float] = (runs + flat[:, whole:].double().square().sum(1)).tolist()
    return [
        norm if _SAFE[0] < norm < _SAFE[1] else sum(float(part.double().square().sum()) for part in delta.split(1024))
        for norm, delta in zip(norms, deltas, strict=True)
    ]
