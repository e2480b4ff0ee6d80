"""What is learned: the flow of pictures, a teacher's path in four steps, and the trip through the VAE.

A latent at noise level sigma is x = (1 - sigma) x0 + sigma noise; the transformer gets time 1 - sigma and predicts
x0 - noise, as Z-Image's does (Lipman et al. 2023, with the sign and time of diffusers' ZImagePipeline).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from training import batched
from training.data import Samples
from training.sampling import grid

BATCH = 64
DROPPED = 0.1
"""Share of the captions that are replaced by the empty prompt, for guidance."""

FEW, SHIFT = 4, 3.0
"""Turbo's steps, and the shift of its noise levels."""

SUBSTEPS = 5
"""The teacher's steps to one of turbo's."""

KL_WEIGHT = 2e-6
"""Small, so that latents keep the edges, and above 0, so that they stay near a normal distribution."""

Captions = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Captions for numbers of prompts; 0 is the empty one."""


def predict(model: ZImageTransformer2DModel, latents: Tensor, sigma: Tensor, captions: tuple[Tensor, Tensor]) -> Tensor:
    with torch.autocast(latents.device.type, torch.bfloat16):
        return batched.velocity(model, latents, 1 - sigma, batched.context(model, *captions))


def flow(
    model: ZImageTransformer2DModel,
    samples: Samples,
    captions: Captions,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Flow matching on one batch: sigma = 3u / (1 + 2u) with u = sigmoid(normal)."""
    clean, numbers = samples.draw(BATCH, generator)
    noise = torch.randn(clean.shape, generator=generator)
    even = torch.sigmoid(torch.randn(BATCH, generator=generator))
    kept = numbers * (torch.rand(BATCH, generator=generator) >= DROPPED)
    clean, noise, even = clean.float().to(device), noise.to(device), even.to(device)
    return flow_at(model, clean, noise, 3 * even / (1 + 2 * even), captions(kept))


def flow_at(
    model: ZImageTransformer2DModel, clean: Tensor, noise: Tensor, sigma: Tensor, captions: tuple[Tensor, Tensor]
) -> Tensor:
    level = sigma.view(-1, 1, 1, 1)
    found = predict(model, (1 - level) * clean + level * noise, sigma, captions)
    return functional.mse_loss(found, clean - noise)


def path_levels() -> Tensor:
    """The teacher's levels: each of turbo's steps in SUBSTEPS even parts."""
    coarse = grid(FEW, SHIFT)
    parts = [torch.linspace(a, b, SUBSTEPS + 1)[:-1] for a, b in itertools.pairwise(coarse.tolist())]
    return torch.cat([*parts, coarse[-1:]])


def distilled(
    model: ZImageTransformer2DModel,
    samples: Samples,
    captions: Captions,
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """One batch of paths: half of it at turbo's own noise levels, half between them.

    At a point of a path turbo learns the mean velocity to its next level, so that one Euler step goes where several of the teacher's go.
    """
    paths, numbers = samples.draw(BATCH, generator)
    segment = torch.randint(FEW, (BATCH,), generator=generator)
    inside = torch.randint(SUBSTEPS, (BATCH,), generator=generator)
    inside[: BATCH // 2] = 0
    return distilled_at(model, paths, segment * SUBSTEPS + inside, (segment + 1) * SUBSTEPS, captions(numbers), device)


def distilled_at(
    model: ZImageTransformer2DModel,
    paths: Tensor,
    start: Tensor,
    end: Tensor,
    captions: tuple[Tensor, Tensor],
    device: torch.device,
) -> Tensor:
    rows, levels = torch.arange(len(paths)), path_levels()
    begin, goal = paths[rows, start].float(), paths[rows, end].float()
    wanted = (goal - begin) / (levels[start] - levels[end]).view(-1, 1, 1, 1)
    found = predict(model, begin.to(device), levels[start].to(device), captions)
    return functional.mse_loss(found, wanted.to(device))


def trip(vae: AutoencoderKL, wanted: Tensor, noise: Tensor) -> Tensor:
    """Pictures -1 to 1 through the VAE: the absolute error of values and of edges, and a little divergence."""
    with torch.autocast(wanted.device.type, torch.bfloat16):
        posterior = vae.encode(wanted).latent_dist
        found = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    edges = sum(functional.l1_loss(found.diff(dim=axis), wanted.diff(dim=axis)) for axis in (2, 3))
    total: Tensor = functional.l1_loss(found, wanted) + edges + KL_WEIGHT * posterior.kl().float().mean()
    return total
