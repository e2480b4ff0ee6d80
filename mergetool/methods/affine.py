"""Methods that sum their arguments with fixed factors, in the expression's own arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated

from mergetool.methods.registry import Range, Text, affine

_Weights = Annotated[tuple[Fraction, ...], Text("the weight of each argument; all 1 by default")]
_Share = Annotated[Fraction, Range(text="the share of the second")]
_Scale = Annotated[Fraction, Range(text="the factor of the sum")]


@affine(takes="any", least=2, most=2)
def weighted_sum(count: int, *, alpha: _Share = Fraction(1, 2)) -> Sequence[Fraction]:
    """Mix two models, or two differences.

    Formula: (1 - alpha) * x1 + alpha * x2
    Source: "weighted sum" of the AUTOMATIC1111 checkpoint merger; linear interpolation
    """
    return (1 - alpha, alpha)


@affine(takes="any")
def linear(
    count: int, *, weights: _Weights = (), normalize: Annotated[bool, Text("divide by the sum of the weights")] = True
) -> Sequence[Fraction]:
    """Average any number of models, or of differences.

    Formula: sum(w_k * x_k) / sum(w_k), without the division for normalize=False
    Source: Model soups, Wortsman et al. 2022, arXiv 2203.05482
    """
    given = weights or (Fraction(1),) * count
    whole = sum(given) if normalize else Fraction(1)
    if whole == 0:
        raise ValueError("weights that add up to 0 cannot be normalized; give normalize=False")
    return [weight / whole for weight in given]


@affine(takes="models", least=3, most=3)
def add_difference(
    count: int, *, alpha: Annotated[Fraction, Range(text="the factor of the difference")] = Fraction(1)
) -> Sequence[Fraction]:
    """Add to one model the difference of two others.

    Formula: x1 + alpha * (x2 - x3)
    Source: "add difference" of the AUTOMATIC1111 checkpoint merger
    """
    return (Fraction(1), alpha, -alpha)


@affine(takes="deltas")
def task_arithmetic(count: int, *, weights: _Weights = (), scale: _Scale = Fraction(1)) -> Sequence[Fraction]:
    """Add up differences.

    Formula: scale * sum(w_k * d_k)
    Source: Editing models with task arithmetic, Ilharco et al. 2023, arXiv 2212.04089
    """
    return [scale * weight for weight in weights or (Fraction(1),) * count]
