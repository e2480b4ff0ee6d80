"""Methods of single elements: kept within bounds, and means of factors instead of terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Annotated

import torch
from torch import Tensor

from mergetool.methods.registry import Range, Site, method


@method(takes="any", least=3, buffers=lambda count: 5)
def clamp(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    stiffness: Annotated[
        float,
        Range(
            0, 1, "how far the bounds are drawn in: 1 leaves, on each side, the argument nearest to the mean of them"
        ),
    ] = 0.0,
) -> Tensor:
    """Keep every element of the first within the range of the others.

    Formula: max(l, min(h, x1)) with h = (1-s)*max(x_k) + s*min(x_k of those >= their mean), l = (1-s)*min(x_k) + s*max(x_k of those <= their mean), k from 2
    Source: clamp of sd-mecha
    """
    value, *bounds = tensors
    high, low = reduce(torch.maximum, bounds), reduce(torch.minimum, bounds)
    if stiffness:
        mean = reduce(torch.Tensor.add_, bounds[1:], bounds[0].clone()).div_(len(bounds))
        above, below = high.clone(), low.clone()
        for bound in bounds:
            torch.where((bound >= mean) & (bound < above), bound, above, out=above)
            torch.where((bound <= mean) & (bound > below), bound, below, out=below)
        high.mul_(1 - stiffness).add_(above.mul_(stiffness))
        low.mul_(1 - stiffness).add_(below.mul_(stiffness))
    kept = torch.minimum(torch.maximum(value, low), high)
    return kept.add_(value.mul_(0))  # which hides no infinity


@method(takes="any", least=2, most=2, buffers=lambda _: 2)
def geometric_sum(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    alpha: Annotated[float, Range(0, 1, "the share of the second: 0 is the first, 1 the second")] = 0.5,
) -> Tensor:
    """Mix two by multiplying powers of their elements: where either is small, so is the result.

    Formula: s * abs(x1)**(1-alpha) * abs(x2)**alpha with s = sign(x1) for equal signs, cos(pi*(1-alpha)) for a negative x1 alone, cos(pi*alpha) for a negative x2 alone
    Source: geometric_sum of sd-mecha: the real part of complex powers

    Devices agree to float32 rounding of powers.
    """
    a, b = tensors
    if alpha in (0.0, 1.0):
        return tensors[int(alpha)]
    turned = a.new_tensor(math.cos(math.pi * alpha)), a.new_tensor(math.cos(math.pi * (1 - alpha)))
    one = torch.ones_like(turned[0])
    sign = torch.where(a < 0, torch.where(b < 0, -one, turned[1]), torch.where(b < 0, turned[0], one))
    return a.abs_().pow_(1 - alpha).mul_(b.abs_().pow_(alpha)).mul_(sign)


@method(takes="models", least=3, most=3, buffers=lambda _: 4)
def multiply_quotient(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    alpha: Annotated[float, Range(0, text="the exponent of the quotient")] = 1.0,
) -> Tensor:
    """Multiply the first by what the second is of the third, where the two moved an element's size in opposite directions.

    Formula: x1 * Re((x2/x3)**e) with e = alpha * max(0, -p*q / max(abs(p), abs(q))**2), p = log(abs(x1/x3)), q = log(abs(x2/x3)); x1 where e is 0 or any is 0
    Source: multiply_quotient of sd-mecha

    Devices agree to float32 rounding of powers and logarithms.
    """
    a, b, c = tensors
    zero = (a == 0).logical_or_(b == 0).logical_or_(c == 0)
    quotient = b.div_(c)
    q = quotient.abs().log_()
    p = a.div(c).abs_().log_()
    largest = torch.maximum(p.abs(), q.abs())
    # each is divided by itself: the square of the larger one may be no float32
    exponent = p.div_(largest).mul_(q.div_(largest)).neg_().clamp_(min=0).mul_(alpha)
    exponent.masked_fill_(zero.logical_or_(largest == 0), 0.0)
    turned = torch.where(quotient < 0, exponent * math.pi, 0.0).cos_()
    power = quotient.abs_().masked_fill_(exponent == 0, 1.0).pow_(exponent)
    return a.mul_(power.mul_(turned))
