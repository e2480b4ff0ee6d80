"""Methods that weigh differences by their agreement, element by element, and add them up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from mergetool.methods import sparsity
from mergetool.methods.consensus import added, agreeing
from mergetool.methods.registry import Range, Site, Text, method
from mergetool.methods.sparse import Density, Seed
from mergetool.ops.reductions import dot, largest, uniform

if TYPE_CHECKING:
    from torch import Tensor

Threshold = Annotated[float, Range(0, text="the magnitude above which an element counts as changed")]


@method(takes="deltas", buffers=lambda arguments: 1.5)
def sce(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Annotated[float, Range(0, 1, "the share of differing elements to keep")] = 1.0,
) -> Tensor:
    """Keep the elements that vary most, and average those that agree in sign. Each difference is weighted by its energy.

    Formula: sum(w_k*d'_k) / sum(w_k) over the k with sign(d'_k) = sign(sum(d'_k)), w_k = sum(d'_k^2) of the whole parameter; d'_k the density*n elements of d_k with
    the largest variance over k
    Source: SCE of FuseChat, Wan et al. 2024, arXiv 2408.07990
    """
    if density < 1:
        variances = _variances(tensors)
        mask = largest(variances, sparsity.count(density, int(variances.count_nonzero())))
        for delta in tensors:
            sparsity.keep(delta, mask)
    energies = [dot(delta, delta) for delta in tensors]
    whole = math.fsum(energies)
    if whole == 0:
        return tensors[0]
    weights = [energy / whole for energy in energies]
    return agreeing(tensors, elect="sum", factors=weights, shares=weights)


def _variances(tensors: Sequence[Tensor]) -> Tensor:
    """The variance of each element over the tensors."""
    import torch

    result = torch.empty_like(tensors[0])
    for places in zip(*(sparsity.blocks(each) for each in (result, *tensors)), strict=True):
        squares, *pieces = (piece for _, piece in places)
        mean = added([pieces[0].clone(), *pieces[1:]]).mul_(1 / len(pieces))
        squares.zero_()
        for piece in pieces:
            moved = piece - mean
            squares.add_(moved.mul_(moved))
    return result


@method(takes="deltas", buffers=lambda arguments: 0.1)
def ram(tensors: Sequence[Tensor], site: Site, *, epsilon: Threshold = 1e-5) -> Tensor:
    """Average each element over those models that have changed it.

    Formula: sum(d_k) / (number of k) over the k with abs(d_k) > epsilon
    Source: Reinforced Agent Merging 2026, arXiv 2601.13572
    """
    return _reinforced(tensors, [1.0] * len(tensors), epsilon)


@method(takes="deltas", buffers=lambda arguments: 0.1)
def ramplus_tl(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    r: Annotated[float, Range(0, text="extra weight for elements that one model alone has changed")] = 0.1,
    alpha: Annotated[float, Range(0, text="the largest factor of r")] = 0.2,
    epsilon: Threshold = 1e-5,
) -> Tensor:
    """Average each element over the models that changed it. Changes of one model alone count more, the more of its changes others share.

    Formula: as ram, and (1 + r*min(alpha, shared_k/alone_k)) * d_k where k alone has changed it; shared_k and alone_k count elements of the parameter
    Source: Reinforced Agent Merging Plus, tensor-local, 2026, arXiv 2601.13572
    """
    shared, alone = [0] * len(tensors), [0] * len(tensors)
    for places in zip(*(sparsity.blocks(delta) for delta in tensors), strict=True):
        changed = [piece.abs() > epsilon for _, piece in places]
        lone = _how_many(changed) == 1
        for k, mask in enumerate(changed):
            counted, single = int(mask.count_nonzero()), int((mask & lone).count_nonzero())
            shared[k] += counted - single
            alone[k] += single
    ratios = [s / a if a else (alpha if s else 0.0) for s, a in zip(shared, alone, strict=True)]
    return _reinforced(tensors, [1 + r * min(alpha, ratio) for ratio in ratios], epsilon)


def _how_many(masks: Sequence[Tensor]) -> Tensor:
    import torch

    return added([masks[0].to(torch.uint8), *masks[1:]])


def _reinforced(tensors: Sequence[Tensor], factors: Sequence[float], epsilon: float) -> Tensor:
    """The mean of those above epsilon, times its factor where it is one alone, in the memory of the first."""
    for places in zip(*(sparsity.blocks(delta) for delta in tensors), strict=True):
        pieces = [piece for _, piece in places]
        changed = [piece.abs() > epsilon for piece in pieces]
        together = _how_many(changed).to(pieces[0].dtype)
        lone = together == 1
        for piece, mask, factor in zip(pieces, changed, factors, strict=True):
            piece.mul_(mask)
            if factor != 1:
                piece.mul_(lone.to(piece.dtype).mul_(factor - 1).add_(1))
        added(pieces).div_(together.clamp_(min=1))
    return tensors[0]


@method(takes="deltas", buffers=lambda arguments: 0.1)
def dropout(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    density: Density = 0.1,
    overlap: Annotated[
        Literal["independent", "exclusive"], Text("whether one element may survive in several, or in one at most")
    ] = "independent",
    seed: Seed = 0,
) -> Tensor:
    """Drop elements of each difference at random, and average the rest. The average makes up for what was dropped.

    Formula: sum(m_k*d_k) / max(1, sum(m_k)) / P, P the probability that any is left: 1 - (1-density)^n independent, density exclusive
    Source: dropout of sd-mecha, after arXiv 2311.03099

    On average it is the mean of the differences, which of a single one is dare_linear. Every parameter and, independent, every argument has its own mask.
    """
    count = len(tensors)
    if density == 0:
        return added(tensors).mul_(0)
    alone = overlap == "exclusive"
    left = density if alone else -math.expm1(count * math.log1p(-density)) if density < 1 else 1.0
    for places in zip(*(sparsity.blocks(delta) for delta in tensors), strict=True):
        pieces = [piece for _, piece in places]
        masks = _masks(places[0][0], pieces, density, site, seed, alone=alone)
        for piece, mask in zip(pieces, masks, strict=True):
            piece.mul_(mask)
        added(pieces).div_(_how_many(masks).to(pieces[0].dtype).clamp_(min=1)).mul_(1 / left)
    return tensors[0]


def _masks(start: int, pieces: Sequence[Tensor], density: float, site: Site, seed: int, *, alone: bool) -> list[Tensor]:
    first = pieces[0]
    if not alone:
        return [uniform(site.key(seed, k), first.shape, first.device, start) < density for k in range(len(pieces))]
    draws = uniform(site.key(seed), first.shape, first.device, start)
    bounds = [density * k / len(pieces) for k in range(len(pieces) + 1)]
    return [(draws >= low) & (draws < high) for low, high in pairwise(bounds)]
