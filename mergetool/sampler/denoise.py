"""Denoise latents: a sampler follows a transformer's velocity with guidance. The guidance is classifier-free.

Latents are float32 [n, channels, height / f, width / f] in the VAE's scaled space, in which both stages work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergetool.errors import NonFiniteError
from mergetool.sampler import samplers

if TYPE_CHECKING:
    from diffusers import ZImageTransformer2DModel

    from mergetool.sampler.request import Stage


def starting_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Draw noise float32 [n, *shape], each picture's by its own seed.

    The generators are the CPU's, whatever the device.

    It is that of ComfyUI for a batch of one, and of torch for seeds of 64 bits, 0 to 2**64 - 1.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def bring_to(latents: Tensor, noise: Tensor, level: float) -> Tensor:
    """Latents with noise added up to ``level``: (1 - level) x0 + level noise."""
    return (1.0 - level) * latents + level * noise


@torch.no_grad()
def denoise(
    transformer: ZImageTransformer2DModel,
    stage: Stage,
    latents: Tensor,
    captions: Sequence[Tensor],
    negatives: Sequence[Tensor],
    seeds: Sequence[int],
    *,
    step_done: Callable[[], None] = lambda: None,
) -> Tensor:
    """Latents at the last of the stage's levels, from ``latents`` at the first.

    ``captions`` and ``negatives`` hold [tokens, width] for each picture, ``seeds`` one number. Guidance g is diffusers': the
    prediction is pos + g (pos - neg), which ComfyUI calls cfg g + 1; at 0 the negatives are not looked at. Raises NonFiniteError
    for a prediction with NaN or infinity, naming the step.
    """
    count, guided = len(latents), stage.guidance != 0
    dtype = next(transformer.parameters()).dtype
    texts = [*captions, *negatives] if guided else list(captions)
    step = 0

    def velocity(latents: Tensor, level: Tensor) -> Tensor:
        nonlocal step
        step += 1
        level = level.to(latents.device)
        # diffusers goes through its scheduler's 1000 steps and back, ComfyUI does not: to the last bit of each, in float32.
        time = (1000 - level * 1000) / 1000 if stage.scheduler == "diffusers" else 1 - level
        inputs = latents.to(dtype).repeat(2 if guided else 1, 1, 1, 1).unsqueeze(2)
        outputs = torch.stack(
            [out.float() for out in transformer(list(inputs), time.expand(len(inputs)), texts, return_dict=False)[0]]
        )
        if guided:
            positive, negative = outputs[:count], outputs[count:]
            outputs = positive + stage.guidance * (positive - negative)
        if not torch.isfinite(outputs).all():
            raise NonFiniteError(
                f"the transformer of {stage.model} predicts NaN or infinity at step {step} of {stage.evaluations} (sigma {float(level):.3f}); "
                f"see with mergetool inspect whether its weights are finite{'; its LoRAs may be too strong' if stage.loras else ''}."
            )
        step_done()
        return -outputs.squeeze(2)

    return samplers.run(stage.sampler, velocity, latents, stage.levels(), seeds=seeds, shift=stage.shift)
