"""Muon for the matrices of the blocks, AdamW for everything else, and the running average that becomes the member."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

WARM_UP = 50
LEAST = 96
"""Matrices with both sides of at least so many rows and columns are Muon's."""

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon:
    """Muon (Jordan et al. 2024) with AdamW's update size (Liu et al. 2025), all matrices of one shape at once."""

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], *, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        self.momentum, self.decay = momentum, decay
        shapes = dict.fromkeys(tuple(parameter.shape) for parameter in parameters)
        self.groups = [[p for p in parameters if tuple(p.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros(len(group), *group[0].shape, device=group[0].device) for group in self.groups]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for group, buffer in zip(self.groups, self.buffers, strict=True):
            gradients = torch.stack([parameter.grad for parameter in group])  # type: ignore[misc]
            buffer.lerp_(gradients, 1 - self.momentum)
            update = _orthogonal(gradients.lerp(buffer, self.momentum))
            size = 0.2 * math.sqrt(max(update.shape[1:]))
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-rate * size)


def _orthogonal(matrices: Tensor) -> Tensor:
    """The nearest orthogonal matrices, roughly: five Newton-Schulz steps on [n, rows, columns]."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if tall else matrices
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if tall else found


class Optimiser:
    """Steps of both optimisers with a warm-up, clipping, and running averages of all ``modules``."""

    def __init__(self, modules: Mapping[str, torch.nn.Module], *, rate: float, steps: int, cosine: bool) -> None:
        self.modules, self.rate, self.steps, self.cosine = modules, rate, steps, cosine
        self.trained = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        matrices = [p for p in self.trained if p.ndim == 2 and min(p.shape) >= LEAST]
        others = [p for p in self.trained if all(p is not matrix for matrix in matrices)]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.averages = {
            name: {key: tensor.clone() for key, tensor in module.state_dict().items()}
            for name, module in modules.items()
        }

    def step(self, loss: Tensor, step: int) -> None:
        """One step of training; ``step`` counts from 0."""
        rate = self.rate * min(1, (step + 1) / WARM_UP)
        if self.cosine:
            rate *= 0.525 + 0.475 * math.cos(math.pi * step / self.steps)
        for parameter in self.trained:
            parameter.grad = None
        torch.autograd.backward(loss)
        for parameter in self.trained:  # the text encoder's last layer is not read
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self.muon.step(rate)
        keep = min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, module in self.modules.items():
                average = self.averages[name]
                floats = [
                    (average[key], tensor) for key, tensor in module.state_dict().items() if tensor.is_floating_point()
                ]
                torch._foreach_lerp_([one for one, _ in floats], [other for _, other in floats], 1 - keep)

    def state(self) -> dict[str, Any]:
        return {"adam": self.adam.state_dict(), "muon": self.muon.buffers, "averages": self.averages}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.adam.load_state_dict(state["adam"])
        for buffer, stored in zip(self.muon.buffers, state["muon"], strict=True):
            buffer.copy_(stored)
        for name, average in self.averages.items():
            for key, tensor in average.items():
                tensor.copy_(state["averages"][name][key])

    def settle(self) -> None:
        """Give the modules their averages."""
        for name, module in self.modules.items():
            module.load_state_dict(self.averages[name])
