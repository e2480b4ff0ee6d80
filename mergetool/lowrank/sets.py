"""Set operations on two deltas of one matrix: common, unique, union, and interference.

Deltas [m, n] are dense tensors, or `LowRank` pairs, whose product is never formed. With thin singular value
decompositions ``Di = Ui Si Vi^T`` the singular value decomposition ``U1^T U2 = X cos(theta) Y^T`` pairs the directions of
the two column spaces (Bjoerck & Golub 1973): ``p_k = U1 x_k`` and ``q_k = U2 y_k``, at the principal angle ``theta_k``. With
``m_k`` the unit vector half-way between them,

    L = sum_k cos^2(theta_k) m_k m_k^T,                      R the same of the row spaces,
    a = ||L D1 R||_F,   b = ||L D2 R||_F,   t = 2 min(a, b) / (a + b),

    common(D1, D2) = t L (D1 + D2) / 2 R
    unique_i       = D_i - common
    union          = common + w1 unique_1 + w2 unique_2      (D1 + D2 - common with weights of 1)

L is the projection onto the intersection of the column spaces where the angles are 0 or 90 degrees, and fades from one to the
other between. t is 1 for equal strengths and keeps a weak delta from borrowing strength: ``||common||`` is at most the smaller of
``||D1||`` and ``||D2||``. Therefore

* common(D1, D2) = common(D2, D1), and common(G D1 H, G D2 H) = G common(D1, D2) H for orthogonal G and H;
* common(D, D) = D;  common(D, 0) = common(D, -D) = 0;  common(D, e D) = e D for 0 < e <= 1;
* it is 0 where the column spaces are orthogonal, or the row spaces are;
* of D1 = K + A1 and D2 = K + A2, where A1 and A2 lie in subspaces orthogonal to each other's and to K's, it is K exactly, and
  for random private subspaces nearly;
* its rank is at most the smaller of the two ranks.

A direction counts as one however weak it is: truncate noisy deltas first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergetool.lowrank.low_rank import LowRank, ThinSvd

NEGLIGIBLE = 2.0**-24
"""Singular values below this share of the largest are rounding noise of float32 factors, no directions."""

_TILE_ROWS = 256


Delta = Tensor | LowRank


@dataclass(frozen=True, slots=True)
class Interference:
    """The degree to which two deltas act on the same thing. All numbers are of D1 with respect to D2.

    ``cosine`` is <D1, D2> / (||D1|| ||D2||), from -1 to 1. ``column_share`` is the share of D1's energy that lies in D2's column
    space, ``||U2 U2^T D1||^2 / ||D1||^2``: outputs that both write to. ``row_share`` is that in D2's row space: inputs that both
    look at. ``both_share`` is that in both. For random subspaces they are about r2 / m, r2 / n and their product.
    ``opposing`` is the share of elements' products that have opposite signs, weighted by their size:
    sum |min(D1 * D2, 0)| / sum |D1 * D2|; 0.5 for unrelated deltas, 0 for equal ones, None where it was not asked for.
    Numbers of a delta of zeros are 0.
    """

    cosine: float
    column_share: float
    row_share: float
    both_share: float
    opposing: float | None


def directions(delta: Delta) -> ThinSvd:
    """The thin singular value decomposition without `NEGLIGIBLE` values.

    Of a pair by QR of its factors: O((m + n) r^2). Of a dense delta whole: O(m n min(m, n)), so give a large one truncated.
    """
    if isinstance(delta, LowRank):
        left, values, right = delta.svd()
    else:
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    kept = int((values > values[0] * NEGLIGIBLE).sum()) if len(values) else 0
    return ThinSvd(left[:, :kept], values[:kept], right[:kept])


def common(first: Delta, second: Delta) -> LowRank:
    """The part that both deltas have, as the module's head defines it, in float64.

    It has no column where only rounding noise is left.

    Example: of ``K + A`` and ``K + B`` it is K where the three lie in orthogonal subspaces. Raises ValueError for deltas of different
    shapes.
    """
    _check_shapes(first, second)
    one, two = directions(first), directions(second)
    left, left_weights = _between(one.left, two.left)
    right, right_weights = _between(one.right.T, two.right.T)
    core_one, core_two = (
        left_weights[:, None] * ((left.T @ found.left) * found.values @ (found.right @ right)) * right_weights
        for found in (one, two)
    )
    a, b = float(torch.linalg.vector_norm(core_one)), float(torch.linalg.vector_norm(core_two))
    balance = 2 * min(a, b) / (a + b) if a > 0 and b > 0 else 0.0
    shared = LowRank(left @ ((core_one + core_two) * (balance / 2)), right.T.contiguous())
    noise = NEGLIGIBLE**2 * min(one.energy, two.energy)
    return shared if shared.energy > noise else LowRank.zeros(shared.shape)


def unique(delta: Delta, shared: Delta) -> Delta:
    """``delta - shared``: the part of a delta beside the `common` one. A pair if both are."""
    return combined([(1.0, delta), (-1.0, shared)])


def union(first: Delta, second: Delta, weights: tuple[float, float] = (1.0, 1.0)) -> Delta:
    """``common + w1 unique_1 + w2 unique_2``: both deltas, their common part once. A pair if both are."""
    return united(first, second, common(first, second), weights)


def united(first: Delta, second: Delta, shared: Delta, weights: tuple[float, float] = (1.0, 1.0)) -> Delta:
    """The `union` of two deltas whose common part is known, perhaps from truncated ones."""
    return combined([(weights[0], first), (weights[1], second), (1.0 - sum(weights), shared)])


def orthogonal_part(delta: Delta, other: Delta) -> Delta:
    """``delta`` without its component along ``other``. D1 - <D1, D2> / <D2, D2> D2, so that <result, other> is 0.

    ``delta`` itself where ``other`` is zero. A pair if both are.
    """
    return combined([(1.0, delta), (-along(delta, other), other)])


def along(delta: Delta, other: Delta) -> float:
    """The multiple of ``other`` in ``delta``: <D1, D2> / <D2, D2>, 0 where ``other`` is zero."""
    _check_shapes(delta, other)
    energy = inner(other, other)
    return inner(delta, other) / energy if energy > 0 else 0.0


def combined(terms: Sequence[tuple[float, Delta]]) -> Delta:
    """The weighted sum of deltas of one shape, in float64. Pairs give the pair of their factors side by side, exactly.

    Terms of weight 0 are left out. Raises ValueError for deltas of different shapes.
    """
    for _, delta in terms:
        _check_shapes(terms[0][1], delta)
    pairs = [(weight, delta) for weight, delta in terms if isinstance(delta, LowRank)]
    if len(pairs) == len(terms):
        return LowRank.sum(pairs)
    total = torch.zeros(terms[0][1].shape, dtype=torch.float64)
    for weight, delta in terms:
        if weight != 0:
            total += weight * (delta.dense() if isinstance(delta, LowRank) else delta.double())
    return total


def inner(first: Delta, second: Delta) -> float:
    """The inner product <D1, D2>, the sum of D1 * D2. Of pairs it is trace((up1^T up2) (down2 down1^T))."""
    if isinstance(first, LowRank):
        if isinstance(second, LowRank):
            return first.inner(second)
        wide = first.wide()
        return float((wide.up.T @ second.double() * wide.down).sum())
    return inner(second, first) if isinstance(second, LowRank) else float((first.double() * second.double()).sum())


def interference(first: Delta, second: Delta, *, signs: bool = False) -> Interference:
    """Measure how much ``first`` acts on the same things as ``second``; see `Interference`.

    ``signs`` asks for ``opposing``, which needs every element: of two pairs by `_TILE_ROWS` rows at a time, O(m n (r1 + r2)). Raises ValueError for
    deltas of different shapes.
    """
    _check_shapes(first, second)
    one, two = directions(first), directions(second)
    opposing = _opposing(first, second) if signs else None
    if one.energy == 0 or two.energy == 0:
        return Interference(0.0, 0.0, 0.0, 0.0, opposing)
    columns, rows = two.left.T @ one.left * one.values, one.values[:, None] * (one.right @ two.right.T)
    product = (columns @ (one.right @ two.right.T)).diagonal() @ two.values

    def share(part: Tensor) -> float:
        return min(float(part.square().sum()) / one.energy, 1.0)

    cosine = float(product) / (one.energy * two.energy) ** 0.5
    return Interference(
        cosine=min(max(cosine, -1.0), 1.0),
        column_share=share(columns),
        row_share=share(rows),
        both_share=share(columns @ (one.right @ two.right.T)),
        opposing=opposing,
    )


def _between(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The directions half-way between two spaces, [m, k] with orthonormal columns, and their weights cos^2, [k]."""
    left, cosines, right = torch.linalg.svd(first.T @ second, full_matrices=False)
    cosines = cosines.clamp(max=1.0)
    middle = (first @ left + second @ right.T) / (2 + 2 * cosines).sqrt()
    return middle, cosines.square()


def _opposing(first: Delta, second: Delta) -> float:
    against = total = 0.0
    for start in range(0, first.shape[0], _TILE_ROWS):
        product = _rows(first, start) * _rows(second, start)
        against -= float(product.clamp(max=0).sum())
        total += float(product.abs().sum())
    return against / total if total > 0 else 0.0


def _rows(delta: Delta, start: int) -> Tensor:
    if isinstance(delta, LowRank):
        return delta.rows(start, _TILE_ROWS)
    return delta[start : start + _TILE_ROWS].double()


def _check_shapes(first: Delta, second: Delta) -> None:
    if tuple(first.shape) != tuple(second.shape):
        raise ValueError(f"deltas of shapes {list(first.shape)} and {list(second.shape)} are not of one matrix")
