"""The stored factors of a decomposition: balanced, rounded, the second fitted to the first.

One decomposition, or many at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergetool.errors import NonFiniteError
from mergetool.lowrank.batched import ieee_float32
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.low_rank import LowRank


def balanced(decomposition: Decomposition, dtype: torch.dtype) -> LowRank:
    """The pair to store, in ``dtype``: up @ down is close to the delta.

    Each takes the square root of the singular values. ``down`` is rounded first; ``up`` is then fitted to the
    rounded ``down`` by least squares, min ||U S V^T - up @ down||_F, and rounded. Raises NonFiniteError when a
    value does not fit ``dtype``.
    """
    work = _working_precision(decomposition, dtype)
    root = decomposition.singular_values.sqrt()
    right = decomposition.right.to(work)
    down = (root.to(work)[:, None] * right).to(dtype)
    # Rows scaled to length 1, and a pseudo-inverse: a row that underflowed to zeros gets no weight.
    scaled = down.to(work) / root.to(work)[:, None]
    gram, projected = (scaled @ scaled.T).double(), (scaled @ right.T).double()
    weights = torch.linalg.pinv(gram, hermitian=True) @ projected / root[:, None]
    up = (decomposition.left.to(work) @ (weights * decomposition.singular_values).to(work).T).to(dtype)
    for factor in (down, up):
        if not bool(torch.isfinite(factor).all()):
            raise NonFiniteError(
                f'the difference of tensor "{decomposition.name}" is too large for {str(dtype).removeprefix("torch.")}: '
                f"its largest singular value is {float(decomposition.singular_values[0]):.3g}; store the LoRA in bf16 or fp32"
            )
    return LowRank(up, down)


def stored_residual(decomposition: Decomposition, stored: LowRank) -> float:
    """||delta - up @ down||_F / ||delta||_F of the stored pair, without reading the delta again.

    delta = U S V^T + T with T V = 0, and down = M V^T + E with M = down V, so that

        ||delta - up @ down||^2 = ||U S - up M||^2 + ||up E||^2 + ||T||^2 - 2 <T, up E>.

    The last term is left out: E is only the rounding error of ``down`` and independent of T. Against dense float64 the
    result was right to 1e-6 for bf16 factors of deltas from 60 x 40 up. Every difference is taken before it is squared.
    """
    if decomposition.rank == 0:
        return 0.0 if decomposition.total_energy == 0.0 else 1.0
    work = _working_precision(decomposition, stored.down.dtype)
    right, rows, columns = decomposition.right.to(work), stored.down.to(work), stored.up.to(work)
    inside = rows @ right.T
    outside = rows - inside @ right
    missed = (decomposition.left.to(work) * decomposition.singular_values.to(work) - columns @ inside).square().sum()
    added = ((columns.T @ columns) * (outside @ outside.T)).sum()
    return math.sqrt(max(float(missed) + float(added) + decomposition.lost_energy, 0.0) / decomposition.total_energy)


def balanced_batch(decompositions: Sequence[Decomposition], dtype: torch.dtype) -> list[tuple[LowRank, float]]:
    """Store decompositions of deltas of one shape, as `balanced` does, on their device.

    Returns each pair, on the CPU, with its `stored_residual`.

    Raises NonFiniteError when a value does not fit ``dtype``.
    """
    most = max((one.rank for one in decompositions), default=0)
    if most == 0:
        return [_alone(one, dtype) for one in decompositions]
    works = [_working_precision(one, dtype) for one in decompositions]
    work = torch.float32 if all(w == torch.float32 for w in works) else torch.float64
    with ieee_float32():
        return _padded(decompositions, dtype, work, most)


def _padded(
    decompositions: Sequence[Decomposition], dtype: torch.dtype, work: torch.dtype, most: int
) -> list[tuple[LowRank, float]]:
    """All pairs with ``most`` directions, those that one does not have being zeros."""
    device = decompositions[0].left.device
    left = torch.zeros(len(decompositions), decompositions[0].left.shape[0], most, dtype=work, device=device)
    right = torch.zeros(len(decompositions), most, decompositions[0].right.shape[1], dtype=work, device=device)
    host = torch.zeros(len(decompositions), most, dtype=torch.float64)
    for i, one in enumerate(decompositions):
        left[i, :, : one.rank], right[i, : one.rank], host[i, : one.rank] = one.left, one.right, one.singular_values
    values = host.to(device)
    root = values.sqrt()
    down = (root[:, :, None].to(work) * right).to(dtype)
    scaled = down.to(work) / torch.where(root > 0, root, 1.0).to(work)[:, :, None]
    gram, projected = (scaled @ scaled.mT).double(), (scaled @ right.mT).double()
    # A row that is zero, by padding or by underflow, gets no weight.
    gram += (gram.diagonal(dim1=1, dim2=2) == 0).double().diag_embed()
    factor, failed = torch.linalg.cholesky_ex(gram)
    weights = torch.cholesky_solve(projected, factor) / torch.where(root > 0, root, 1.0)[:, :, None]
    up = (left @ (weights * values[:, None, :]).to(work).mT).to(dtype)
    lost = torch.tensor([one.lost_energy for one in decompositions], dtype=torch.float64, device=device)
    missed = _missed(left, values.to(work), right, down.to(work), up.to(work)).double() + lost
    sound = torch.isfinite(up).all((1, 2)) & torch.isfinite(down).all((1, 2)) & (failed == 0)
    sound &= gram.diagonal(dim1=1, dim2=2).amin(1) > 0.5
    missing, usable = missed.clamp_min(0.0).tolist(), sound.tolist()
    down, up = down.cpu(), up.cpu()
    return [
        (LowRank(up[i, :, : one.rank], down[i, : one.rank]), (missing[i] / one.total_energy) ** 0.5)
        if usable[i] and one.rank
        else _alone(one, dtype)
        for i, one in enumerate(decompositions)
    ]


def _missed(left: Tensor, values: Tensor, right: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The energies ||U S - up M||^2 + ||up E||^2 of ``stored_residual``, [B]."""
    inside = down @ right.mT
    outside = down - inside @ right
    missed = (left * values[:, None, :] - up @ inside).square().sum((1, 2))
    added: Tensor = ((up.mT @ up) * (outside @ outside.mT)).sum((1, 2))
    return missed + added


def _alone(one: Decomposition, dtype: torch.dtype) -> tuple[LowRank, float]:
    """One pair by the CPU's path, which has a pseudo-inverse for rows that underflow, and the error for an overflow."""
    here = replace(one, left=one.left.cpu(), right=one.right.cpu())
    stored = balanced(here, dtype)
    return stored, stored_residual(here, stored)


def _working_precision(decomposition: Decomposition, dtype: torch.dtype) -> torch.dtype:
    """The dtype to work in for factors of ``dtype``: float32 where its error, 2^-24, is far below their rounding.

    Float64 took 25 ms more for each 10240 x 3840 matrix. It is kept for float32 factors, and for singular values whose
    fourth powers would leave float32's range.
    """
    values = decomposition.singular_values
    inside = decomposition.rank > 0 and float(values[0]) < 1e9 and float(values[-1]) > 1e-9
    return torch.float32 if dtype != torch.float32 and inside else torch.float64
