"""Samplers: follow a model's velocity from noise to a picture. Their arithmetic is that of the programs that name them.

euler           one step along the velocity; ComfyUI's and diffusers'
res_multistep   exponential integrator of second order that remembers the step before (arXiv 2308.02157, as ComfyUI has it)
dpmpp_2m_sde    DPM-Solver++(2M), midpoint, that adds noise after every step (arXiv 2211.01095), from a Brownian tree on the CPU

Latents are float32 [n, channels, height, width]; a level is a float32 scalar tensor on the CPU. Formulas and their order are those of
comfy/k_diffusion/sampling.py of ComfyUI 0.30.0. Where a schedule repeats a level, there is nothing to do and nothing is done: there
ComfyUI's multistep samplers divide by zero.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mergetool.sampler.schedule import shifted

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A function from latents and their level to the direction of more noise: noise - picture, float32 of the latents' shape."""


class Sampler(Protocol):
    """A sampler: latents at the last level, from latents at the first."""

    def __call__(
        self, velocity: Velocity, latents: Tensor, levels: Tensor, *, seeds: Sequence[int], shift: float
    ) -> Tensor: ...


def run(
    name: str, velocity: Velocity, latents: Tensor, levels: Sequence[float], *, seeds: Sequence[int], shift: float
) -> Tensor:
    """Follow ``latents`` down ``levels``, asking ``velocity`` once at each.

    The last level and repeated ones do not ask it.

    ``seeds`` holds one for every picture, ``shift`` is the schedule's; only a sampler that adds noise looks at them.
    """
    distinct = torch.tensor([level for level, _ in itertools.groupby(levels)], dtype=torch.float32)
    return _SAMPLERS[name](velocity, latents, distinct, seeds=seeds, shift=shift)


def euler(velocity: Velocity, latents: Tensor, levels: Tensor, *, seeds: Sequence[int], shift: float) -> Tensor:
    for now, then in itertools.pairwise(levels):
        latents = latents + (then - now) * velocity(latents, now)
    return latents


def res_multistep(velocity: Velocity, latents: Tensor, levels: Tensor, *, seeds: Sequence[int], shift: float) -> Tensor:
    before: Tensor | None = None
    for i, (now, then) in enumerate(itertools.pairwise(levels)):
        picture = latents - velocity(latents, now) * now
        if before is None or then == 0:
            latents = latents + (latents - picture) / now * (then - now)
        else:
            h = now.log() - then.log()
            c2 = (now.log() - levels[i - 1].log()) / h
            phi1 = torch.expm1(-h) / -h
            phi2 = (phi1 - 1.0) / -h
            latents = h.neg().exp() * latents + h * ((phi1 - phi2 / c2) * picture + phi2 / c2 * before)
        before = picture
    return latents


def dpmpp_2m_sde(velocity: Velocity, latents: Tensor, levels: Tensor, *, seeds: Sequence[int], shift: float) -> Tensor:
    noise = _brownian(latents, levels, seeds)
    if levels[0] >= 1:  # where the signal-to-noise ratio is infinite, the first ten-thousandth of the way is left out
        levels = torch.cat([torch.tensor([shifted(1 - 1e-4, shift)], dtype=torch.float32), levels[1:]])
    before: Tensor | None = None
    last = torch.tensor(0.0)
    for now, then in itertools.pairwise(levels):
        picture: Tensor = latents - velocity(latents, now) * now
        if then == 0:
            return picture
        ratio = then.logit().neg()  # half of the logarithm of the signal-to-noise ratio
        h = ratio - now.logit().neg()
        moved = then * ratio.exp() * (-2 * h).expm1().neg()
        latents = then / now * (-h).exp() * latents + moved * picture
        if before is not None:
            latents = latents + 0.5 * moved * (h / last) * (picture - before)
        latents = latents + noise(now, then) * then * (-2 * h).expm1().neg().sqrt()
        before, last = picture, h
    return latents


def _brownian(latents: Tensor, levels: Tensor, seeds: Sequence[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Noise of variance 1 for a step from one level to a lower one, from a Brownian tree for every picture, of its own seed."""
    from torchsde import BrownianTree

    reached = levels[levels > 0]
    if len(reached) < 2:  # one step, which ends without noise
        return lambda now, then: torch.zeros_like(latents)
    start = torch.zeros(latents.shape[1:])
    trees = [BrownianTree(reached.min(), start, reached.max(), entropy=seed) for seed in seeds]

    def noise(now: Tensor, then: Tensor) -> Tensor:
        with warnings.catch_warnings():  # that the last digits of a level are outside the tree's ends, which it rounds
            warnings.simplefilter("ignore")
            steps = torch.stack([-tree(then, now) for tree in trees])
        return (steps / (now - then).sqrt()).to(latents.device)

    return noise


_SAMPLERS: dict[str, Sampler] = {"euler": euler, "res_multistep": res_multistep, "dpmpp_2m_sde": dpmpp_2m_sde}
