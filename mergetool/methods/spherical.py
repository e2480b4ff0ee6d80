"""Methods that interpolate on a sphere: directions and sizes apart.

Whatever these compute lies in the span of their arguments, so its factors follow from the arguments' dot products, in float64,
and no tensor but the arguments is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from mergetool.methods.registry import Range, Site, Text, method
from mergetool.ops.reductions import combination, dot, gram, norm, row_dots, row_norms

if TYPE_CHECKING:
    from torch import Tensor

_Place = Annotated[float, Range(text="the place between the two: 0 is the first, 1 the second")]
_Weights = Annotated[tuple[float, ...], Text("the weight of each argument; all 1 by default")]

STRAIGHT = 1e-6
"""Sines of angles below which the arc between two arguments is a line: they differ by 1e-12 there, or have no arc (opposite ones)."""


@method(takes="any", least=2, most=2, buffers=lambda _: 0)
def slerp(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    t: _Place = 0.5,
    sizes: Annotated[
        Literal["arc", "line"],
        Text("arc: interpolate the arguments themselves; line: their directions, and their norms on a line"),
    ] = "arc",
) -> Tensor:
    """Go from one to the other along the arc between them. Each parameter is one vector.

    Formula: (sin((1-t)*w)*x1 + sin(t*w)*x2) / sin(w), w the angle between x1 and x2; (1-t)*x1 + t*x2 where sin(w) < 1e-6. For sizes="line" x1 and x2 are divided by their norms, and the result multiplied by (1-t)*norm(x1) + t*norm(x2)
    Source: Animating rotation with quaternion curves, Shoemake 1985

    Shoemake's vectors are of one length; of two lengths sizes="arc" is what mergekit computes, sizes="line" what sd-mecha computes.
    mergekit takes the line for every angle below 1.8 degrees, where the arc is up to 0.012 % longer; fine-tunes of one model are
    closer than that.
    """
    a, b = tensors
    norms = norm(a), norm(b)
    factors = _arc(dot(a, b), *norms, t)
    if sizes == "line" and all(norms):
        size = (1 - t) * norms[0] + t * norms[1]
        factors = factors[0] * size / norms[0], factors[1] * size / norms[1]
    return combination(tensors, factors)


@method(takes="any", least=2, most=2, buffers=lambda _: 2)
def nuslerp(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    t: _Place = 0.5,
    per: Annotated[
        Literal["tensor", "row", "column"],
        Text("the vectors: the whole parameter, its rows (outputs) or its columns (inputs)"),
    ] = "tensor",
) -> Tensor:
    """Go from one to the other along the arc between them. The whole parameter is one vector, or every row or column by itself.

    Formula: slerp(x1, x2, t) of each vector
    Source: nuslerp of mergekit, Goddard 2024

    A parameter of one dimension is one vector. mergekit's weights w1 and w2 are t = w2/(w1+w2) here; its nuslerp_row_wise=True
    takes the columns of torch's matrices, its False the rows (of more than two dimensions, the last one only).
    """
    a, b = tensors
    if per == "tensor" or a.ndim < 2:
        return combination(tensors, _arc(dot(a, b), norm(a), norm(b), t))
    turned = a.movedim(1, 0).shape
    x, y = (tensor.movedim(0 if per == "row" else 1, 0).flatten(1) for tensor in tensors)
    numbers = zip(row_dots(x, y).tolist(), row_norms(x).tolist(), row_norms(y).tolist(), strict=True)
    factors = [_arc(product, one, other, t) for product, one, other in numbers]
    first, second = x.new_tensor(factors).reshape(-1, 2).T
    result = x.mul_(first[:, None]).add_(y.mul_(second[:, None]))
    return result.reshape(a.shape) if per == "row" else result.reshape(turned).movedim(0, 1).contiguous()


@method(takes="any", buffers=lambda _: 0)
def multislerp(tensors: Sequence[Tensor], site: Site, *, weights: _Weights = ()) -> Tensor:
    """Average the directions of any number, and their norms, each parameter as one vector.

    Formula: m / norm(m) * sum(w_k * norm(x_k)) / sum(w_k) with m = sum(w_k * x_k / norm(x_k)); sum(w_k * x_k) / sum(w_k) where the directions cancel; without the division where the weights add up to 0
    Source: Multi-SLERP of mergekit, Goddard 2024, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea

    The source goes from m along the mean of the arguments' components across m, which is zero: m is their mean. So this is all of it.
    Its normalize_weights=False multiplies by the sum of the weights.
    """
    weights = weights or (1.0,) * len(tensors)
    return _on_sphere(tensors, weights, lambda cosines, shares: shares)


@method(takes="any", buffers=lambda _: 0)
def karcher(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    weights: _Weights = (),
    iterations: Annotated[int, Range(0, 10_000, "the largest number of steps")] = 100,
    tolerance: Annotated[float, Range(0, text="stop after a step of this length, in radians")] = 1e-10,
) -> Tensor:
    """Average directions so that the squared angles to them are least. Their norms are averaged too; each parameter is one vector, and there may be any number.

    Formula: m * sum(w_k * norm(x_k)) / sum(w_k), m the unit vector with the least sum(w_k * angle(m, x_k)**2): from the mean direction, steps of sum(w_k * log_m(x_k)) / sum(w_k) along the sphere
    Source: Karcher 1977, Riemannian center of mass and mollifier smoothing; in merging mergekit's karcher, arXiv 2603.04972

    mergekit stops after 10 steps or at 1e-5; these cost nothing here, since only the arguments' dot products move. Arguments that are
    zero have no direction; mergekit leaves out those with norms up to 1e-5 too.
    """
    weights = weights or (1.0,) * len(tensors)
    return _on_sphere(tensors, weights, lambda cosines, shares: _karcher(cosines, shares, iterations, tolerance))


def _arc(product: float, first: float, second: float, t: float) -> tuple[float, float]:
    """The factors of two vectors on the arc between them, from their dot product and their norms."""
    lengths = first * second
    cosine = max(-1.0, min(1.0, product / lengths)) if lengths else 1.0
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    if sine < STRAIGHT:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


_Matrix = list[list[float]]
Vector = list[float]


def _on_sphere(
    tensors: Sequence[Tensor], weights: Sequence[float], mean: Callable[[_Matrix, Vector], Vector]
) -> Tensor:
    """The weighted mean of the norms in a mean direction, which ``mean`` gives as a combination of the unit vectors.

    ``mean`` is told the cosines of all pairs of arguments that are not zero, and their weights. A mean without direction leaves
    the weighted mean of the arguments.
    """
    products = gram(tensors)
    norms = [math.sqrt(products[k][k]) for k in range(len(tensors))]
    whole = sum(weights) or 1.0
    known = [k for k, length in enumerate(norms) if length]
    cosines = [[products[i][j] / (norms[i] * norms[j]) for j in known] for i in known]
    direction = _unit(cosines, mean(cosines, [weights[k] for k in known]))
    if direction is None:
        return combination(tensors, [weight / whole for weight in weights])
    size = sum(weight * length for weight, length in zip(weights, norms, strict=True)) / whole
    factors = dict(zip(known, direction, strict=True))
    return combination(tensors, [size * factors[k] / norms[k] if k in factors else 0.0 for k in range(len(tensors))])


def _unit(cosines: _Matrix, vector: Vector) -> Vector | None:
    """The combination of unit vectors scaled to length 1; None where it is too short to have a direction."""
    length = _length(cosines, vector)
    return None if length <= STRAIGHT * sum(map(abs, vector)) else [value / length for value in vector]


def _length(cosines: _Matrix, vector: Vector) -> float:
    return math.sqrt(max(0.0, sum(x * value for x, value in zip(vector, _times(cosines, vector), strict=True))))


def _times(cosines: _Matrix, vector: Vector) -> Vector:
    return [sum(x * y for x, y in zip(row, vector, strict=True)) for row in cosines]


def _karcher(cosines: _Matrix, weights: Vector, iterations: int, tolerance: float) -> Vector:
    """The mean on the sphere of unit vectors, as a combination of them."""
    whole = sum(weights) or 1.0
    shares = [weight / whole for weight in weights]
    mean = _unit(cosines, shares)
    if mean is None:  # no direction to start from: mergekit starts from the first, too
        mean = [1.0, *[0.0] * (len(shares) - 1)] if shares else []
    for _ in range(iterations):
        dots = [max(-1.0, min(1.0, value)) for value in _times(cosines, mean)]
        logs = [share * _stretch(value) for share, value in zip(shares, dots, strict=True)]
        along = sum(log * value for log, value in zip(logs, dots, strict=True))
        step = [log - along * value for log, value in zip(logs, mean, strict=True)]
        length = _length(cosines, step)
        if not length > tolerance:
            break
        turned = [math.cos(length) * m + math.sin(length) / length * s for m, s in zip(mean, step, strict=True)]
        mean = _unit(cosines, turned) or mean
    return mean


def _stretch(cosine: float) -> float:
    """angle / sin(angle): 1 for no angle, 0 for the opposite of a vector, which lies in no direction from it."""
    sine = math.sqrt((1 - cosine) * (1 + cosine))
    if sine < STRAIGHT:
        return 1.0 if cosine > 0 else 0.0
    return math.acos(cosine) / sine
