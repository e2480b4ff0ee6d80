"""Methods that find the middle of models or differences, each parameter as one point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated

from mergetool.methods.consensus import added, scale_each
from mergetool.methods.registry import Site, Text, method
from mergetool.methods.sparsity import blocks, by_rows
from mergetool.ops.reductions import dot, norm, row_dots, row_norms

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 1000
"""The most steps of Weiszfeld's iteration, on the weights alone: some dozens are enough, but for points that nearly
are the median themselves."""


@method(takes="deltas", least=2, buffers=lambda arguments: 0.1)
def model_stock(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    filter_wise: Annotated[bool, Text("one t for each index of the first dimension, not for each parameter")] = False,
) -> Tensor:
    """Shrink the average of fine-tunes of one model towards that model. The less alike they are, the more it shrinks.

    Formula: t * mean(d_k), t = n*c / (1 + (n-1)*c), c the mean cosine of two d_k, at least 0
    Source: Model Stock, Jang et al. 2024, arXiv 2403.19522

    The formula is for fine-tunes that lie around a common centre, where cosines are positive; a negative one is taken for 0, as it is a sign that they
    have nothing in common. mergekit lets t grow without bound towards c = -1/(n-1).
    """
    import torch

    count = len(tensors)
    if not filter_wise:
        share = _stock(_cosine(tensors), count)
        return added(tensors).mul_(share / count)
    shares = torch.tensor([_stock(cosine, count) / count for cosine in _row_cosines([by_rows(x) for x in tensors])])
    result = added(tensors)
    by_rows(result).mul_(shares.to(result)[:, None])
    return result


def _cosine(tensors: Sequence[Tensor]) -> float:
    """The mean cosine of two of the tensors; that with a tensor of zeros is 0."""
    norms = [norm(x) for x in tensors]
    pairs = list(combinations(range(len(tensors)), 2))
    return math.fsum(_divided(dot(tensors[i], tensors[j]), norms[i] * norms[j]) for i, j in pairs) / len(pairs)


def _row_cosines(tensors: Sequence[Tensor]) -> list[float]:
    norms = [row_norms(x) for x in tensors]
    pairs = list(combinations(range(len(tensors)), 2))
    cosines = [
        [_divided(top, below) for top, below in zip(*(each.tolist() for each in columns), strict=True)]
        for columns in ((row_dots(tensors[i], tensors[j]), norms[i] * norms[j]) for i, j in pairs)
    ]
    return [math.fsum(row) / len(pairs) for row in zip(*cosines, strict=True)]


def _divided(top: float, below: float) -> float:
    return top / below if below else 0.0


def _stock(cosine: float, count: int) -> float:
    if cosine <= 0:
        return 0.0
    return count * cosine / (1 + (count - 1) * cosine)


@method(takes="any", least=2, buffers=lambda arguments: 0.1)
def geometric_median(tensors: Sequence[Tensor], site: Site) -> Tensor:
    """Take the point whose distances to all of them add up to least. One outlier cannot pull it away.

    Formula: argmin over y of sum(norm(y - x_k)), as sum(w_k * x_k) / sum(w_k) with w_k = 1 / norm(y - x_k)
    Source: Sur le point pour lequel la somme des distances est minimum, Weiszfeld 1937; where it is one of the points: Vardi and Zhang 2000

    Where many points are the median, as between two models, it is the one that the iteration from the mean leads to. The distances between all pairs are
    measured once; the iteration, to the last digit of float64, is on the weights.
    """
    squares = _squared_distances(tensors)
    scale_each(tensors, _weiszfeld(squares))
    return added(tensors)


def _squared_distances(tensors: Sequence[Tensor]) -> list[list[float]]:
    squares = [[0.0] * len(tensors) for _ in tensors]
    for i, j in combinations(range(len(tensors)), 2):
        pieces = zip(blocks(tensors[i]), blocks(tensors[j]), strict=True)
        squares[i][j] = squares[j][i] = sum(norm(a - b) ** 2 for (_, a), (_, b) in pieces)
    return squares


def _weiszfeld(squares: Sequence[Sequence[float]]) -> list[float]:
    """The weights of the points, which add up to 1, from their squared distances."""
    count = len(squares)
    for k in range(count):
        if _is_median(squares, k):
            return [float(i == k) for i in range(count)]
    weights = [1 / count] * count
    for _ in range(STEPS):
        inverse = [1 / max(distance, 1e-300) for distance in _to_center(squares, weights)]
        whole = math.fsum(inverse)
        updated = [each / whole for each in inverse]
        moved = max(abs(new - old) for new, old in zip(updated, weights, strict=True))
        weights = updated
        if not moved > 1e-15:
            break
    return weights


def _is_median(squares: Sequence[Sequence[float]], k: int) -> bool:
    """Whether the unit vectors from point k to the others add up to less than its own weight, the number of points that are there."""
    others = [i for i in range(len(squares)) if squares[i][k] != 0]
    pull = math.fsum(
        (squares[i][k] + squares[j][k] - squares[i][j]) / 2 / math.sqrt(squares[i][k] * squares[j][k])
        for i in others
        for j in others
    )
    return math.sqrt(max(pull, 0.0)) < len(squares) - len(others) - 1e-9


def _to_center(squares: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """The distance of each point to the weighted mean."""
    means = [math.fsum(w * square for w, square in zip(weights, row, strict=True)) for row in squares]
    spread = math.fsum(w * mean for w, mean in zip(weights, means, strict=True)) / 2
    return [math.sqrt(max(mean - spread, 0.0)) for mean in means]
