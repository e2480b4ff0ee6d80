"""Methods that thin out each difference, then add them up, with or without elected signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from mergetool.methods import sparsity
from mergetool.methods.consensus import Elect, added, agreeing, scale_each
from mergetool.methods.registry import Range, Site, Text, method

if TYPE_CHECKING:
    from torch import Tensor

_Weights = Annotated[tuple[float, ...], Text("a factor for each difference; all 1 by default")]
_Scale = Annotated[float, Range(text="the factor of the result")]
Density = Annotated[float, Range(0, 1, "the share of each difference's elements to keep")]
Epsilon = Annotated[
    float, Range(0, 0.5, "the distance of the smallest and largest elements' probabilities from density")
]
Gamma = Annotated[float, Range(0, 1, "the share of the largest elements to drop")]
Rescale = Annotated[bool, Text("divide kept elements by their probability, to keep the mean")]
Seed = Annotated[int, Range(0, 2**63 - 1, "the seed of the random numbers")]
Sign = Annotated[Elect, Text("elect a sign by the sum of the weighted elements, or by their number")]
Normalize = Annotated[bool, Text("divide by the summed sizes of the weights that agree")]


def _sum(deltas: Sequence[Tensor], weights: Sequence[float], scale: float) -> Tensor:
    scale_each(deltas, weights)
    return added(deltas).mul_(scale)


def _mean(deltas: Sequence[Tensor], weights: Sequence[float], scale: float, elect: Elect, *, normalize: bool) -> Tensor:
    scale_each(deltas, weights)
    sizes = [abs(weight) for weight in weights or [1.0] * len(deltas)]
    return agreeing(deltas, elect=elect, shares=sizes if normalize else ()).mul_(scale)


@method(takes="deltas", buffers=lambda arguments: 0.4)
def ties(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.2,
    weights: _Weights = (),
    elect: Sign = "sum",
    normalize: Normalize = True,
    scale: _Scale = 1.0,
) -> Tensor:
    """Keep each difference's largest elements, and average those that have the elected sign. A sign is elected for every element.

    Formula: scale * sum(w_k*d'_k) / sum(abs(w_k)) over the k with sign(w_k*d'_k) = sign(sum(w_k*d'_k)); d'_k the density*n largest of d_k
    Source: TIES-Merging, Yadav et al. 2023, arXiv 2306.01708

    The paper keeps a fifth where nothing is known; mergekit keeps all unless told. Where the sum is exactly 0, nothing is elected and
    the result is 0; mergekit elects plus, which makes the result depend on the sign of its input.
    """
    for delta in tensors:
        sparsity.trim(delta, density)
    return _mean(tensors, weights, scale, elect, normalize=normalize)


@method(takes="deltas", buffers=lambda arguments: 0.1)
def dare_linear(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.1,
    weights: _Weights = (),
    rescale: Rescale = True,
    scale: _Scale = 1.0,
    seed: Seed = 0,
) -> Tensor:
    """Drop elements of each difference at random, and add up the rest. What is left is divided by the share that is.

    Formula: scale * sum(w_k * d_k * m_k / density), m_k of 0 and 1, 1 with the probability density
    Source: Language models are super Mario, Yu et al. 2023, arXiv 2311.03099
    """
    for place, delta in enumerate(tensors):
        sparsity.drop(delta, density, site.key(seed, place), rescale=rescale)
    return _sum(tensors, weights, scale)


@method(takes="deltas", buffers=lambda arguments: 0.1)
def dare_ties(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.1,
    weights: _Weights = (),
    rescale: Rescale = True,
    elect: Sign = "sum",
    normalize: Normalize = False,
    scale: _Scale = 1.0,
    seed: Seed = 0,
) -> Tensor:
    """Drop elements as dare_linear does, and add up those that have the elected sign.

    Formula: scale * sum(w_k*d'_k) over the k with sign(w_k*d'_k) = sign(sum(w_k*d'_k)); d'_k = d_k*m_k/density
    Source: Language models are super Mario, Yu et al. 2023, arXiv 2311.03099, with the election of arXiv 2306.01708
    """
    for place, delta in enumerate(tensors):
        sparsity.drop(delta, density, site.key(seed, place), rescale=rescale)
    return _mean(tensors, weights, scale, elect, normalize=normalize)


@method(takes="deltas", buffers=lambda arguments: 0.2)
def della_linear(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.5,
    epsilon: Epsilon = 0.15,
    weights: _Weights = (),
    rescale: Rescale = True,
    scale: _Scale = 1.0,
    seed: Seed = 0,
) -> Tensor:
    """Drop elements of each difference at random, and add up the rest. Small ones are dropped rather than large ones of the same row.

    Formula: scale * sum(w_k * d_k * m_k / p_k), m_k 1 with the probability p_k = density - epsilon + 2*epsilon*(rank-1)/(row-1)
    Source: DELLA-Merging, Deep et al. 2024, arXiv 2406.11617; epsilon as mergekit counts it

    The rank is that of the magnitude in its row of the weight, 1 the smallest. Each element is divided by its own probability, as in the paper.
    """
    for place, delta in enumerate(tensors):
        sparsity.drop_by_rank(delta, density, epsilon, site.key(seed, place), rescale=rescale)
    return _sum(tensors, weights, scale)


@method(takes="deltas", buffers=lambda arguments: 0.2)
def della(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.5,
    epsilon: Epsilon = 0.15,
    weights: _Weights = (),
    rescale: Rescale = True,
    elect: Sign = "sum",
    normalize: Normalize = True,
    scale: _Scale = 1.0,
    seed: Seed = 0,
) -> Tensor:
    """Drop elements as della_linear does, and average those that have the elected sign. A sign is elected for every element.

    Formula: scale * sum(w_k*d'_k) / sum(abs(w_k)) over the k with sign(w_k*d'_k) = sign(sum(w_k*d'_k)); d'_k = d_k*m_k/p_k
    Source: DELLA-Merging, Deep et al. 2024, arXiv 2406.11617
    """
    for place, delta in enumerate(tensors):
        sparsity.drop_by_rank(delta, density, epsilon, site.key(seed, place), rescale=rescale)
    return _mean(tensors, weights, scale, elect, normalize=normalize)


@method(takes="deltas", buffers=lambda arguments: 0.6)
def breadcrumbs(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.15,
    gamma: Gamma = 0.01,
    weights: _Weights = (),
    scale: _Scale = 1.0,
) -> Tensor:
    """Leave out each difference's very largest elements, and add up the next largest.

    Formula: scale * sum(w_k * d'_k), d'_k the density*n largest of d_k after its gamma*n largest
    Source: Model Breadcrumbs, Davari and Belilovsky 2023, arXiv 2312.06795; density and gamma as mergekit counts them
    """
    for delta in tensors:
        sparsity.trim_outliers(delta, density, gamma)
    return _sum(tensors, weights, scale)


@method(takes="deltas", buffers=lambda arguments: 0.6)
def breadcrumbs_ties(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.15,
    gamma: Gamma = 0.01,
    weights: _Weights = (),
    elect: Sign = "sum",
    normalize: Normalize = False,
    scale: _Scale = 1.0,
) -> Tensor:
    """Thin out as breadcrumbs does, and add up elements that have the elected sign.

    Formula: scale * sum(w_k*d'_k) over the k with sign(w_k*d'_k) = sign(sum(w_k*d'_k)); d'_k as in breadcrumbs
    Source: Model Breadcrumbs, arXiv 2312.06795, with the election of TIES-Merging, arXiv 2306.01708, as in mergekit
    """
    for delta in tensors:
        sparsity.trim_outliers(delta, density, gamma)
    return _mean(tensors, weights, scale, elect, normalize=normalize)
