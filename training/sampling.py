"""Captions and sampling: prompts to what the transformer reads, noise to latents, latents to pictures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from numpy.typing import NDArray
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from training import batched
from training.models import CHANNELS, REDUCTION


class Reader:
    """Reads prompts as ZImagePipeline does. Gradients flow through the text encoder where they are on."""

    def __init__(self, tokenizer: Qwen2Tokenizer, encoder: Qwen3Model) -> None:
        self.tokenizer, self.encoder = tokenizer, encoder
        self._known: dict[str, list[int]] = {}

    def ids(self, prompt: str) -> list[int]:
        if prompt not in self._known:
            message = [{"role": "user", "content": prompt}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            self._known[prompt] = self.tokenizer(text)["input_ids"]
        return self._known[prompt]

    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions [n, 32, text width] and where they are real [n, 32]; prompts of this world have 32 tokens at most."""
        found = [self.ids(prompt) for prompt in prompts]
        ids = torch.zeros(len(found), batched.MULTIPLE, dtype=torch.long)
        known = torch.zeros(ids.shape, dtype=torch.bool)
        for row, tokens in enumerate(found):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            known[row, : len(tokens)] = True
        device = self.encoder.device
        # The encoder is causal: what follows a caption does not change it.
        states = self.encoder(input_ids=ids.to(device), output_hidden_states=True).hidden_states[-2]
        return states.float(), known.to(device)

    @torch.no_grad()
    def many(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """As a call, in parts and without gradients."""
        parts = [self(prompts[i : i + 256]) for i in range(0, len(prompts), 256)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def grid(steps: int, shift: float) -> Tensor:
    """Noise levels 1 to 0, ``steps`` + 1 of them, at a scheduler shift."""
    even = torch.linspace(1, 0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def noise(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Latents of pure noise for pictures of ``size`` = (width, height)."""
    return torch.randn(count, CHANNELS, size[1] // REDUCTION, size[0] // REDUCTION, generator=generator)


@torch.no_grad()
def sample(
    model: ZImageTransformer2DModel,
    captions: tuple[Tensor, Tensor],
    start: Tensor,
    sigmas: Tensor,
    *,
    guidance: float = 0.0,
    empty: tuple[Tensor, Tensor] | None = None,
    path: list[Tensor] | None = None,
) -> Tensor:
    """Latents at the last of ``sigmas`` by Euler steps from ``start``; every latent on the way is added to ``path``.

    With ``guidance`` g the velocity is v + g (v - v of the ``empty`` caption), as in diffusers.
    """
    latents = start
    if guidance:
        assert empty is not None
        captions = tuple(torch.cat([one, none.expand_as(one)]) for one, none in zip(captions, empty, strict=True))
    with torch.autocast(start.device.type, torch.bfloat16):
        refined = batched.context(model, *captions)
        for now, then in itertools.pairwise(sigmas.tolist()):
            inputs = torch.cat([latents, latents]) if guidance else latents
            time = torch.full((len(inputs),), 1 - now, device=latents.device)
            found = batched.velocity(model, inputs, time, refined)
            if guidance:
                asked, unasked = found.chunk(2)
                found = asked + guidance * (asked - unasked)
            latents = latents + (now - then) * found
            if path is not None:
                path.append(latents)
    return latents


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: NDArray[np.uint8]) -> Tensor:
    """Scaled latents of pictures uint8 [n, height, width, 3]: the means of the posterior."""
    device = next(vae.parameters()).device
    parts = []
    for start in range(0, len(pictures), 64):
        wanted = torch.from_numpy(pictures[start : start + 64]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(vae.encode(wanted).latent_dist.mean)
    return (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> NDArray[np.uint8]:
    """Pictures uint8 [n, height, width, 3] of scaled latents."""
    parts = []
    for part in latents.split(64):
        pictures = vae.decode(part / vae.config.scaling_factor + vae.config.shift_factor).sample
        parts.append(((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(parts)
