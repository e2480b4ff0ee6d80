"""The sum of differences, and the mean of those that agree in sign."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mergetool.methods.sparsity import blocks

if TYPE_CHECKING:
    from torch import Tensor

Elect = Literal["sum", "count"]


def scale_each(deltas: Sequence[Tensor], weights: Sequence[float]) -> None:
    """Multiply each, in place, by its weight; by 1 where there are none."""
    for delta, weight in zip(deltas, weights, strict=bool(weights)):
        delta.mul_(weight)


def added(deltas: Sequence[Tensor]) -> Tensor:
    """The sum, in the memory of the first."""
    result = deltas[0]
    for delta in deltas[1:]:
        result.add_(delta)
    return result


def agreeing(
    deltas: Sequence[Tensor], *, elect: Elect, factors: Sequence[float] = (), shares: Sequence[float] = ()
) -> Tensor:
    """Add up the differences whose sign is elected, element by element.

    The sum is in the memory of the first. The sign of their sum is elected, or the commoner one; none where the sum is 0 or both are as
    common, and then the result is 0. ``factors``: what each is multiplied by after the vote; all 1 where there are none. ``shares``: the
    sum is divided by the sum of the shares of those that agree.
    """
    pieces = zip(*(blocks(delta) for delta in deltas), strict=True)
    for places in pieces:
        _agreeing([piece for _, piece in places], elect, factors or [1.0] * len(deltas), shares)
    return deltas[0]


def _agreeing(deltas: Sequence[Tensor], elect: Elect, factors: Sequence[float], shares: Sequence[float]) -> None:
    signs = [delta.sign() for delta in deltas]
    votes = deltas if elect == "sum" else signs
    elected = votes[0].clone()
    for vote in votes[1:]:
        elected.add_(vote)
    elected.sign_()
    masks = [sign == elected for sign in signs]
    for delta, mask, factor in zip(deltas, masks, factors, strict=True):
        delta.mul_(mask)
        if factor != 1:
            delta.mul_(factor)
    result = added(deltas)
    if shares:
        whole = masks[0].to(result.dtype).mul_(shares[0])
        for mask, share in zip(masks[1:], shares[1:], strict=True):
            whole.add_(mask.to(result.dtype).mul_(share))
        result.div_(whole.masked_fill_(whole == 0, 1))
