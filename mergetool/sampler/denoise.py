"""The loop that turns noise into latents: Euler steps of the flow, with classifier-free guidance.

Latents are float32 [n, channels, height / f, width / f] in the VAE's scaled space, in which both stages work.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel


def starting_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Noise float32 [n, *shape], each picture's from a CPU generator of its own seed, whatever the device."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def bring_to(latents: Tensor, noise: Tensor, level: float) -> Tensor:
    """Latents with noise added up to ``level``: (1 - level) x0 + level noise."""
    return (1.0 - level) * latents + level * noise


@torch.no_grad()
def denoise(
    transformer: ZImageTransformer2DModel,
    latents: Tensor,
    levels: Sequence[float],
    captions: Sequence[Tensor],
    negatives: Sequence[Tensor],
    guidance: float,
    *,
    step_done: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents at the last of ``levels``, from ``latents`` at the first; the arithmetic of diffusers' ZImagePipeline.

    ``captions`` and ``negatives`` hold [tokens, width] for each picture. ``guidance`` g is diffusers': the prediction
    is pos + g (pos - neg), which ComfyUI calls cfg g + 1; at 0 the negatives are not looked at.
    """
    dtype = next(transformer.parameters()).dtype
    count = len(latents)
    texts = [*captions, *negatives] if guidance > 0 else list(captions)
    for now, then in itertools.pairwise(levels):
        # Through the scheduler's 1000 steps and back, in float32, so that times agree with diffusers' to the last bit.
        step = torch.tensor(now, dtype=torch.float32, device=latents.device) * 1000
        time = ((1000 - step.expand(count)) / 1000).repeat(2 if guidance > 0 else 1)
        inputs = latents.to(dtype).repeat(2 if guidance > 0 else 1, 1, 1, 1).unsqueeze(2)
        outputs = torch.stack([out.float() for out in transformer(list(inputs), time, texts, return_dict=False)[0]])
        if guidance > 0:
            positive, negative = outputs[:count], outputs[count:]
            outputs = positive + guidance * (positive - negative)
        size = torch.tensor(then, dtype=torch.float32) - torch.tensor(now, dtype=torch.float32)
        latents = latents + size.to(latents.device) * -outputs.squeeze(2)
        step_done()
    return latents
