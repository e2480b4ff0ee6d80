"""Methods of single elements: kept within bounds, and means of factors instead of terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Annotated

from mergetool.methods.registry import Range, Site, method
from mergetool.ops.reductions import in_blocks

if TYPE_CHECKING:
    from torch import Tensor


@method(takes="any", least=3, buffers=lambda _: 0)
def clamp(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    stiffness: Annotated[
        float,
        Range(0, 1, "how far to draw the bounds in: 1 leaves, on each side, the argument nearest to their mean"),
    ] = 0.0,
) -> Tensor:
    """Keep every element of the first within the range of the others.

    Formula: max(l, min(h, x1)) with h = (1-s)*max(x_k) + s*min(x_k of those >= their mean), l = (1-s)*min(x_k) + s*max(x_k of those <= their mean), k from 2
    Source: clamp of sd-mecha
    """
    return in_blocks(lambda value, *bounds: _clamped(value, bounds, stiffness), tensors)


def _clamped(value: Tensor, bounds: Sequence[Tensor], stiffness: float) -> Tensor:
    import torch

    high, low = reduce(torch.maximum, bounds), reduce(torch.minimum, bounds)
    if stiffness:
        mean = reduce(torch.Tensor.add_, bounds[1:], bounds[0].clone()).div_(len(bounds))
        above, below = high.clone(), low.clone()
        for bound in bounds:
            torch.where((bound >= mean) & (bound < above), bound, above, out=above)
            torch.where((bound <= mean) & (bound > below), bound, below, out=below)
        high.mul_(1 - stiffness).add_(above.mul_(stiffness))
        low.mul_(1 - stiffness).add_(below.mul_(stiffness))
    kept = torch.minimum(torch.maximum(value, low, out=low), high, out=low)
    for tensor in (value, *bounds):
        kept.add_(tensor.mul_(0))  # which hides no infinity
    return kept


@method(takes="any", least=2, most=2, buffers=lambda _: 0)
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
    import torch

    if alpha in (0.0, 1.0):
        return tensors[int(alpha)]

    def mix(a: Tensor, b: Tensor) -> Tensor:
        first, second = a < 0, b < 0
        sign = torch.ones_like(a).masked_fill_(second, math.cos(math.pi * alpha))
        sign.masked_fill_(first, math.cos(math.pi * (1 - alpha))).masked_fill_(first & second, -1.0)
        return a.abs_().pow_(1 - alpha).mul_(b.abs_().pow_(alpha)).mul_(sign)

    return in_blocks(mix, tensors)


@method(takes="models", least=3, most=3, buffers=lambda _: 0)
def multiply_quotient(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    alpha: Annotated[float, Range(0, text="the exponent of the quotient")] = 1.0,
) -> Tensor:
    """Multiply the first by the quotient of the second and the third. It does so where the first and the second moved an element's size in opposite directions.

    Formula: x1 * Re((x2/x3)**e) with e = alpha * max(0, -p*q / max(abs(p), abs(q))**2), p = log(abs(x1/x3)), q = log(abs(x2/x3)); x1 where e is 0 or any is 0
    Source: multiply_quotient of sd-mecha

    Devices agree to float32 rounding of powers and logarithms.
    """
    return in_blocks(lambda a, b, c: _multiplied(a, b, c, alpha), tensors)


def _multiplied(a: Tensor, b: Tensor, c: Tensor, alpha: float) -> Tensor:
    import torch

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
