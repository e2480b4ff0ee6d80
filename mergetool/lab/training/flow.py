"""Flow matching on the closed world: latents, the loss, one training loop for all members.

A latent at noise level sigma is x = (1 - sigma) x0 + sigma noise; the transformer gets time 1 - sigma and predicts
x0 - noise, as Z-Image's does (Lipman et al. 2023, with the sign and time of diffusers' ZImagePipeline).
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from mergetool.lab import checker
from mergetool.lab.world import SCENES, SIZE, Placing, Scene, render

BATCH = 64
DROPPED = 0.1
"""Share of the captions that are replaced by the empty prompt, for guidance."""


@dataclass
class PictureSet:
    """Drawn pictures uint8 [n, 64, 64, 3] and their prompts."""

    pixels: np.ndarray
    prompts: list[str]

    @classmethod
    def draw(cls, count: int, seed: int, *, striped: bool = False, hollow: bool = False) -> PictureSet:
        generator = np.random.default_rng(seed)
        scenes = [SCENES[i] for i in generator.integers(len(SCENES), size=count)]
        drawn = [render(scene, Placing.random(generator), striped=striped, hollow=hollow) for scene in scenes]
        return cls(np.stack(drawn), [scene.prompt for scene in scenes])

    def tensor(self, index: slice | Tensor) -> Tensor:
        """Pictures as float32 [n, 3, 64, 64] in -1 to 1."""
        return torch.from_numpy(self.pixels[index]).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: PictureSet) -> Tensor:
    """Scaled latents float32 [n, 16, 16, 16]: the means of the posterior."""
    parts = [
        vae.encode(pictures.tensor(slice(i, i + 128))).latent_dist.mean for i in range(0, len(pictures.prompts), 128)
    ]
    latents: Tensor = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """Pictures uint8 [n, 64, 64, 3] of scaled latents."""
    pictures = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    found: np.ndarray = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return found


def captions(pipeline: ZImagePipeline, prompts: Sequence[str]) -> list[Tensor]:
    """The text encoder's output for each prompt, [tokens, 64]; gradients flow. ZImagePipeline makes the same."""
    texts = [
        pipeline.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    inputs = pipeline.tokenizer(texts, padding=True, return_tensors="pt")
    states = pipeline.text_encoder(**inputs, output_hidden_states=True).hidden_states[-2]
    return [state[mask] for state, mask in zip(states, inputs.attention_mask.bool(), strict=True)]


def predict(model: ZImageTransformer2DModel, latents: Tensor, sigma: Tensor, texts: list[Tensor]) -> Tensor:
    """x0 - noise [n, 16, 16, 16] as the transformer sees it, at noise levels ``sigma`` [n]."""
    outputs = model([latent.unsqueeze(1) for latent in latents], 1 - sigma, texts, return_dict=False)[0]
    return torch.stack(outputs).squeeze(2).float()


def grid(steps: int, shift: float) -> Tensor:
    """Noise levels 1 to 0, ``steps`` + 1 of them, at a scheduler shift."""
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


@torch.no_grad()
def sample(
    model: ZImageTransformer2DModel,
    texts: list[Tensor],
    noise: Tensor,
    sigmas: Tensor,
    *,
    guidance: float = 0.0,
    empty: Tensor | None = None,
    path: list[Tensor] | None = None,
) -> Tensor:
    """Latents at the last of ``sigmas``, by Euler steps from ``noise``.

    Every latent on the way is added to ``path``.
    """
    latents = noise
    for now, then in itertools.pairwise(sigmas):
        sigma = now.expand(len(latents))
        out = predict(model, latents, sigma, texts)
        if guidance:
            assert empty is not None
            out = out + guidance * (out - predict(model, latents, sigma, [empty] * len(latents)))
        latents = latents + (now - then) * out
        if path is not None:
            path.append(latents)
    return latents


@torch.no_grad()
def adherence(
    pipeline: ZImagePipeline, *, steps: int, shift: float, guidance: float, count: int = 64, seed: int = 9
) -> dict[str, float]:
    """Shares of ``count`` sampled pictures that show their prompt, are striped, and are hollow."""
    generator = np.random.default_rng(seed)
    scenes: list[Scene] = [SCENES[i] for i in generator.integers(len(SCENES), size=count)]
    *texts, empty = captions(pipeline, [*(scene.prompt for scene in scenes), ""])
    noise = torch.randn(count, 16, SIZE // 4, SIZE // 4, generator=torch.Generator().manual_seed(seed))
    latents = sample(pipeline.transformer.eval(), texts, noise, grid(steps, shift), guidance=guidance, empty=empty)
    found = [checker.read(picture) for picture in decode(pipeline.vae, latents)]
    return {
        "adherence": float(np.mean([reading.matches(scene) for reading, scene in zip(found, scenes, strict=True)])),
        "striped": float(np.mean([reading.striped for reading in found])),
        "hollow": float(np.mean([reading.hollow for reading in found])),
    }


def train(
    parameters: Sequence[torch.nn.Parameter],
    loss: Callable[[], Tensor],
    *,
    steps: int,
    rate: float,
    averaged: Sequence[torch.nn.Module] = (),
    report: Callable[[int, float, float], None],
) -> None:
    """Train with warm-up, a cosine and gradient clipping. The ``averaged`` modules end as their running averages.

    Matrices of the transformer's blocks by Muon, everything else by AdamW.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim == 2 and min(parameter.shape) >= 96]
    others = [parameter for parameter in parameters if all(parameter is not matrix for matrix in matrices)]
    optimisers: list[torch.optim.Optimizer] = [torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=0.01)]
    if matrices:
        optimisers.append(torch.optim.Muon(matrices, rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    averages = [copy.deepcopy(module.state_dict()) for module in averaged]
    begin, running = time.monotonic(), 0.0
    for step in range(steps):
        for group in [group for optimiser in optimisers for group in optimiser.param_groups]:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.525 + 0.475 * math.cos(math.pi * step / steps))
        # BF16 products from float32 weights: a quarter faster for the transformer here, twice for the VAE.
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        for optimiser in optimisers:
            optimiser.zero_grad()
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        decay = min(0.995, (1 + step) / (10 + step))
        for module, average in zip(averaged, averages, strict=True):
            for name, tensor in module.state_dict().items():
                average[name].lerp_(tensor, 1 - decay)
        running = value.item() if step == 0 else 0.98 * running + 0.02 * value.item()
        if step % 50 == 49 or step == steps - 1:
            report(step + 1, running, time.monotonic() - begin)
    for module, average in zip(averaged, averages, strict=True):
        module.load_state_dict(average)


def flow_loss(
    model: ZImageTransformer2DModel,
    latents: Tensor,
    texts: Callable[[Tensor], list[Tensor]],
    generator: torch.Generator,
) -> Tensor:
    """The flow-matching loss of one batch: sigma = 3u / (1 + 2u) with u = sigmoid(normal)."""
    index = torch.randint(len(latents), (BATCH,), generator=generator)
    clean = latents[index]
    noise = torch.randn(clean.shape, generator=generator)
    even = torch.sigmoid(torch.randn(BATCH, generator=generator))
    sigma = 3 * even / (1 + 2 * even)
    level = sigma.view(-1, 1, 1, 1)
    found = predict(model, (1 - level) * clean + level * noise, sigma, texts(index))
    return functional.mse_loss(found, clean - noise)
