"""One comparison of a method with a peer's, on tensors of several shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mergetool import methods
from mergetool.methods import Site

SITE = Site("layers.0.attention.to_q.weight")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Theirs:
    """A peer's method: whose it is, how it was called as the table writes it, and the call itself, on float32 tensors."""

    peer: Literal["mergekit", "sd-mecha"]
    text: str
    call: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """Our ``method`` with ``parameters`` and ``theirs``, on the same ``count`` tensors.

    Without ``why`` the largest difference, relative to their largest element, is at most ``rounding``, in every shape. With it
    they differ by more than that in every shape, and ``why`` says who is wrong or what is meant differently.
    """

    method: str
    theirs: Theirs
    parameters: Mapping[str, object] = field(default_factory=dict)
    count: int = 3
    inputs: Literal["models", "deltas", ""] = ""  # "": what the method takes, models where it takes either
    size: float = 1.0  # what the inputs are multiplied by
    rounding: float = 1e-6
    why: str = ""
    shapes: Sequence[Shape] = ((96, 40), (257,), (8, 6, 3, 3))

    @property
    def name(self) -> str:
        shown = ", ".join(f"{name}={value}" for name, value in self.parameters.items())
        return f"{self.method}({shown}) against {self.theirs.peer} {self.theirs.text}"

    @property
    def kind(self) -> str:
        """Whether its tensors are models or differences."""
        return self.inputs or ("deltas" if methods.find(self.method).takes == "deltas" else "models")

    def difference(self, shape: Shape) -> float:
        """The largest absolute difference, relative to their largest element. Raises AssertionError where a result is not finite."""
        method = methods.find(self.method)
        given = [self.size * tensor for tensor in tensors(self.kind, self.count, shape)]
        ours = apply(method, [tensor.clone() for tensor in given], self.parameters)
        theirs = self.theirs.call([tensor.clone() for tensor in given])
        assert ours.shape == theirs.shape == shape
        assert ours.isfinite().all()
        assert theirs.isfinite().all()
        return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())

    def largest_difference(self) -> float:
        """The largest difference in any of the shapes."""
        return max(self.difference(shape) for shape in self.shapes)


def apply(method: methods.Method, given: Sequence[Tensor], parameters: Mapping[str, object]) -> Tensor:
    """The method on the tensors; one that is a weighted sum, in float32 as the expression would compute it."""
    if method.function is not None:
        return method.function(given, SITE, **parameters)
    assert method.factors is not None
    factors = method.factors(len(given), **parameters)
    return torch.stack([tensor * float(factor) for tensor, factor in zip(given, factors, strict=True)]).sum(dim=0)


def tensors(kind: str, count: int, shape: Shape) -> list[Tensor]:
    """Tensors as fine-tunes of one model have them, or their differences from it, which are related but not alike; no two elements are alike."""
    random = torch.Generator().manual_seed(len(shape) + count)
    base = 0.02 * torch.randn(shape, generator=random)
    common = 0.002 * torch.randn(shape, generator=random)
    deltas = [common + 0.003 * torch.randn(shape, generator=random) for _ in range(count)]
    return deltas if kind == "deltas" else [base + delta for delta in deltas]
