"""Methods of linear algebra: projections, and the strong directions of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from mergetool.methods.registry import Range, Site, method
from mergetool.ops.reductions import dot

if TYPE_CHECKING:
    from torch import Tensor


@method(takes="deltas", least=2, most=2, buffers=lambda _: 0)
def perpendicular(tensors: Sequence[Tensor], site: Site) -> Tensor:
    """Keep the part of the first difference that is orthogonal to the second. Each parameter is one vector.

    Formula: d1 - d2 * <d1, d2> / <d2, d2>, d1 where d2 is zero
    Source: Gram-Schmidt; sd-mecha's perpendicular_component, which takes the two in the other order
    """
    a, b = tensors
    square = dot(b, b)
    return a.sub_(b.mul_(dot(a, b) / square)) if square else a


@method(takes="deltas", least=1, most=1, buffers=lambda _: 6)
def truncate_rank(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    rank: Annotated[int, Range(0, text="the largest number of directions to keep; 0 lets energy decide")] = 8,
    energy: Annotated[float, Range(0, 1, "keep the fewest directions with this share of the sum of squares")] = 1.0,
) -> Tensor:
    """Keep the strongest directions of a difference. What it leaves out is often noise.

    Formula: sum over i <= r of s_i * u_i * v_i^T, with s, u, v the singular values and vectors of the matrix [outputs, all else]; r the fewest with sum(s_i**2, i <= r) >= energy * sum(s_i**2), at most rank
    Source: Eckart and Young 1936; truncate_rank of sd-mecha

    Parameters of one dimension stay as they are. Computed in float64 and rounded once, so it is the truncated decomposition to float32
    rounding where s_r and s_(r+1) are apart; sd-mecha's default is a random basis after two iterations, another one in
    every run. Devices agree to float32 rounding.
    """
    from mergetool.lowrank.exact import strongest_rows  # with it comes torch, which no list of methods needs

    (delta,) = tensors
    if delta.ndim < 2 or not delta.numel():
        return delta
    matrix = delta.flatten(1)
    most = min(rank or min(matrix.shape), min(matrix.shape))
    total = dot(delta, delta)
    if (most == min(matrix.shape) and energy == 1) or total == 0 or not math.isfinite(total):
        return delta
    places = range(0, len(matrix), 1024)
    rows = strongest_rows(matrix, most, energy)
    tall = matrix.shape[0] >= matrix.shape[1]
    image = None if tall else sum(rows[:, at : at + 1024] @ matrix[at : at + 1024].double() for at in places)
    for at in places:
        block = matrix[at : at + 1024]
        block.copy_((block.double() @ rows.T) @ rows if image is None else rows[:, at : at + 1024].T @ image)
    return matrix.reshape(delta.shape)
