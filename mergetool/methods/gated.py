"""Methods that go from model to model by an amount for every element, row or column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from mergetool.methods.registry import Range, Site, method
from mergetool.ops.reductions import BLOCK, column_dots, dot, in_blocks, kth_largest, norm, row_dots

if TYPE_CHECKING:
    from torch import Tensor

Lowered = Annotated[float, Range(text="subtract this from the cosine; more brings more of the second")]


@method(takes="any", least=2, most=2, buffers=lambda _: 0)
def nearswap(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    t: Annotated[float, Range(0, text="the largest step of an element, in units of the weights")] = 0.0001,
) -> Tensor:
    """Take the second where the two are near. Elsewhere move towards it by a fixed amount.

    Formula: x1 + max(-t, min(t, x2 - x1))
    Source: alchemonaut 2024, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001

    The source's weight min(1, t / abs(x1 - x2)) for the second is this. mergekit's is t / 1e-6 at most, which
    makes elements closer than that move less for a t below it.
    """

    def swap(a: Tensor, b: Tensor) -> Tensor:
        difference = b.sub_(a)
        step = difference.clamp(-t, t)
        return a.add_(step).add_(difference.mul_(0))  # which hides no infinity

    return in_blocks(swap, tensors)


@method(takes="any", least=2, most=2, buffers=lambda _: 0.1)
def add_cosine_a(tensors: Sequence[Tensor], site: Site, *, alpha: Lowered = 0.0) -> Tensor:
    """Keep the first where its columns point the same way as the second's. Elsewhere take the second.

    Formula: x1 + k*(x2-x1) with k = 1 - max(0, min(1, c - alpha)), c the cosine of x1 and x2 over the first dimension
    Source: cosineA of SuperMerger, as sd-mecha's add_cosine_a has it

    SuperMerger spreads the cosines over 0 to 1 by the least and the greatest of the whole model; sd-mecha and this do not. The default
    of sd-mecha, alpha=1, gives the second everywhere.
    """
    a, b = tensors
    return _gated(a, b, _cosines(a, b), alpha)


@method(takes="any", least=2, most=2, buffers=lambda _: 0.1)
def add_cosine_b(tensors: Sequence[Tensor], site: Site, *, alpha: Lowered = 0.0) -> Tensor:
    """Do as add_cosine_a with a mean of two cosines: the column's and the whole parameter's.

    Formula: x1 + k*(x2-x1) with k = 1 - max(0, min(1, (c + C)/2 - alpha)), c the cosine over the first dimension, C that of all elements
    Source: cosineB of SuperMerger, as sd-mecha's add_cosine_b has it
    """
    a, b = tensors
    lengths = norm(a) * norm(b)
    return _gated(a, b, (_cosines(a, b) + (dot(a, b) / lengths if lengths else 0.0)) / 2, alpha)


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """The cosine of each pair of columns, float64; 0 where one is zero."""
    import torch

    lengths = (column_dots(a, a) * column_dots(b, b)).sqrt()
    return column_dots(a, b) / torch.where(lengths == 0, 1.0, lengths)


def _gated(a: Tensor, b: Tensor, cosines: Tensor, alpha: float) -> Tensor:
    shares = (1 - (cosines - alpha).clamp(0, 1)).to(a.dtype)
    return a.add_(b.sub_(a).mul_(shares))


@method(takes="models", least=3, most=3, buffers=lambda _: 0)
def train_difference(
    tensors: Sequence[Tensor],
    site: Site,
    *,
    alpha: Annotated[float, Range(text="the factor of the difference")] = 1.0,
) -> Tensor:
    """Add the second model's training beyond the third. More is added where the first lies far from the second.

    Formula: x1 + 1.8 * alpha * m * (x2 - x3) with m = abs(x1-x2) / (abs(x1-x2) + abs(x2-x3)), 0 where both are 0
    Source: trainDifference of SuperMerger; sd-mecha's train_difference_mask times the difference
    """

    def train(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        learned = b - c
        far = b.sub_(a).abs_()
        both = learned.abs().add_(far)
        far.div_(both.masked_fill_(both == 0, 1.0))  # where both are 0, so is the numerator
        return a.add_(learned.mul_(far).mul_(1.8 * alpha))

    return in_blocks(train, tensors)


@method(takes="any", least=2, most=2, buffers=lambda _: 1.1)
def arcee_fusion(tensors: Sequence[Tensor], site: Site) -> Tensor:
    """Take the second model's elements that changed most, in rows whose distribution changed.

    Formula: x2 where i >= median(i) + 1.5 * (q3(i) - q1(i)), else x1; i = abs(x2-x1) * KL(softmax(x2) || softmax(x1)) over rows, quartiles of the whole parameter
    Source: Arcee Fusion of mergekit

    The quartile q of n values is the one at place floor(q * (n-1)), counted from 0. Softmax plus 1e-8 in each place, as mergekit has it, but in
    float64: its float32 loses all digits of divergences below 1e-7. mergekit guesses the quartiles of more than a million
    elements from a random million of them. Exponentials and logarithms are the library's: where they differ, an element at the
    threshold may be taken on one device and not on another.
    """
    a, b = tensors
    difference = b.sub_(a)
    importance = difference.abs()
    if importance.numel():
        rows = importance.view(-1, importance.shape[-1] if importance.ndim else 1)
        x, y = a.reshape(rows.shape), difference.reshape(rows.shape)
        step = max(1, BLOCK // 4 // rows.shape[1])
        for at in range(0, len(rows), step):
            rows[at : at + step] *= _divergences(x[at : at + step].double(), y[at : at + step].double())
        places = (int(share * (importance.numel() - 1)) for share in (0.25, 0.5, 0.75))
        low, middle, high = (kth_largest(importance, importance.numel() - place) for place in places)
        difference.mul_(importance.ge_(middle + 1.5 * (high - low)))
    return a.add_(difference)


def _divergences(old: Tensor, change: Tensor) -> Tensor:
    """KL(softmax(old + change) || softmax(old)) of each row, float32 [rows, 1]."""
    import torch

    p = torch.softmax(change.add_(old), dim=1).add_(1e-8)
    q = torch.softmax(old, dim=1).add_(1e-8)
    return row_dots(p, torch.div(p, q, out=q).log_())[:, None].float()
