"""The factors to store of many decompositions at once: what ``svd.balanced_factors`` and ``stored_residual`` are for one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergetool.lowrank.batched import ieee_float32
from mergetool.lowrank.svd import Decomposition, balanced_factors, stored_residual, working_precision


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """A pair as it is stored, on the CPU: ``down`` [r, n], ``up`` [m, r]; ``residual`` as ``stored_residual`` says."""

    down: Tensor
    up: Tensor
    residual: float


def factors_of(found: Sequence[Decomposition], dtype: torch.dtype) -> list[Factors]:
    """The pairs for decompositions of deltas of one shape, worked out on their device.

    Raises NonFiniteError when a value does not fit ``dtype``.
    """
    most = max((one.rank for one in found), default=0)
    if most == 0:
        return [_alone(one, dtype) for one in found]
    works = [working_precision(one, dtype) for one in found]
    work = torch.float32 if all(w == torch.float32 for w in works) else torch.float64
    with ieee_float32():
        return _padded(found, dtype, work, most)


def _padded(found: Sequence[Decomposition], dtype: torch.dtype, work: torch.dtype, most: int) -> list[Factors]:
    """All pairs with ``most`` directions, those that one does not have being zeros."""
    device = found[0].left.device
    left = torch.zeros(len(found), found[0].left.shape[0], most, dtype=work, device=device)
    right = torch.zeros(len(found), most, found[0].right.shape[1], dtype=work, device=device)
    host = torch.zeros(len(found), most, dtype=torch.float64)
    for i, one in enumerate(found):
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
    lost = torch.tensor([one.lost_energy for one in found], dtype=torch.float64, device=device)
    missed = _missed(left, values.to(work), right, down.to(work), up.to(work)).double() + lost
    sound = torch.isfinite(up).all((1, 2)) & torch.isfinite(down).all((1, 2)) & (failed == 0)
    sound &= gram.diagonal(dim1=1, dim2=2).amin(1) > 0.5
    missing, usable = missed.clamp_min(0.0).tolist(), sound.tolist()
    down, up = down.cpu(), up.cpu()
    return [
        Factors(down[i, : one.rank], up[i, :, : one.rank], (missing[i] / one.total_energy) ** 0.5)
        if usable[i] and one.rank
        else _alone(one, dtype)
        for i, one in enumerate(found)
    ]


def _missed(left: Tensor, values: Tensor, right: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The energies ||U S - up M||^2 + ||up E||^2 of ``stored_residual``, [B]."""
    inside = down @ right.mT
    outside = down - inside @ right
    missed = (left * values[:, None, :] - up @ inside).square().sum((1, 2))
    added: Tensor = ((up.mT @ up) * (outside @ outside.mT)).sum((1, 2))
    return missed + added


def _alone(one: Decomposition, dtype: torch.dtype) -> Factors:
    """One pair by the CPU's path, which has a pseudo-inverse for rows that underflow, and the words for what overflows."""
    here = replace(one, left=one.left.cpu(), right=one.right.cpu())
    down, up = balanced_factors(here, dtype)
    return Factors(down, up, stored_residual(here, down, up))
