"""Train the VAE: 64 x 64 pictures to 16 x 16 latents of 16 channels, and back. Edges stay sharp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from mergetool.lab.training import flow, models

KL_WEIGHT = 2e-6
"""Small, so that latents keep the edges, and above 0, so that they stay near a normal distribution."""


def train(
    pictures: flow.PictureSet, *, steps: int, seed: int, report: Callable[[int, float, float], None]
) -> AutoencoderKL:
    """A VAE whose scaled latents have mean 0 and standard deviation 1 over the pictures."""
    torch.manual_seed(seed)
    vae = models.vae()
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        wanted = pictures.tensor(torch.randint(len(pictures.prompts), (32,), generator=generator))
        posterior = vae.encode(wanted).latent_dist
        found = vae.decode(posterior.sample(generator)).sample.float()
        edges = sum(functional.l1_loss(found.diff(dim=axis), wanted.diff(dim=axis)) for axis in (2, 3))
        total: Tensor = functional.l1_loss(found, wanted) + edges + KL_WEIGHT * posterior.kl().mean()
        return total

    flow.train(list(vae.parameters()), loss, steps=steps, rate=2e-3, averaged=[vae], report=report)
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    latents = flow.encode(vae, pictures)
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    return vae.eval()
