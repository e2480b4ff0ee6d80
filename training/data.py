"""What members are trained on: drawn pictures, pictures that members drew, and a teacher's paths.

Each set is made in chunks, one file each, so that making it can stop and go on; a chunk depends on its number and the set's seed only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from torch import Tensor

from training import sampling
from training.world import SIZES, Picture, Scene, place, render

SHARES = (6, 1, 1)
"""How often each of SIZES is met, in eighths."""

Chunk = dict[str, object]


@dataclass(frozen=True, slots=True)
class Plan:
    """How many chunks of how many samples a set has, by size: ``chunks`` in the order of SIZES."""

    chunks: tuple[int, int, int]
    each: int

    def sizes(self) -> list[tuple[int, int]]:
        return [size for size, count in zip(SIZES, self.chunks, strict=True) for _ in range(count)]


def make(folder: Path, plan: Plan, maker: Callable[[int, tuple[int, int]], Chunk], paused: Callable[[], bool]) -> bool:
    """Make the chunks that are missing; False when ``paused`` said to stop before all were there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(plan.sizes()):
        path = folder / f"{number:04}.pt"
        if path.exists():
            continue
        if paused():
            return False
        staged = path.with_suffix(".new")
        torch.save(maker(number, size), staged)
        os.replace(staged, path)
    return True


def drawn(number: int, size: tuple[int, int], count: int, seed: int, **style: bool) -> tuple[np.ndarray, list[Scene]]:
    """Pictures uint8 [count, height, width, 3] of chunk ``number``, and their scenes."""
    generator = np.random.default_rng([seed, number])
    scenes = [Scene.random(generator, size) for _ in range(count)]
    pictures: list[Picture] = [render(scene, place(scene, size, generator), size, **style) for scene in scenes]
    return np.stack(pictures), scenes


def drawn_chunk(vae: AutoencoderKL, number: int, size: tuple[int, int], count: int, seed: int, **style: bool) -> Chunk:
    """Latents of drawn pictures."""
    pictures, scenes = drawn(number, size, count, seed, **style)
    return {"latents": sampling.encode(vae, pictures).cpu(), "prompts": [scene.prompt for scene in scenes]}


def validation(vae: AutoencoderKL, count: int, seed: int, **style: bool) -> tuple[Tensor, list[str]]:
    """Latents and prompts of drawn pictures of pairs that are held out."""
    generator = np.random.default_rng([seed, 10**6])
    scenes = [Scene.random(generator, held_out=True) for _ in range(count)]
    pictures = [render(scene, place(scene, SIZES[0], generator), SIZES[0], **style) for scene in scenes]
    return sampling.encode(vae, np.stack(pictures)).cpu(), [scene.prompt for scene in scenes]


@dataclass(frozen=True, slots=True)
class Painter:
    """A member that draws what others are trained on."""

    model: ZImageTransformer2DModel
    reader: sampling.Reader
    sigmas: Tensor
    guidance: float

    def paint(self, number: int, size: tuple[int, int], count: int, seed: int) -> tuple[list[Tensor], list[str]]:
        """All latents on the way of chunk ``number``'s pictures, noise first, and their prompts."""
        generator = np.random.default_rng([seed, number])
        prompts = [Scene.random(generator, size).prompt for _ in range(count)]
        device = next(self.model.parameters()).device
        start = sampling.noise(count, size, torch.Generator().manual_seed(int(generator.integers(2**62)))).to(device)
        path = [start]
        captions, empty = self.reader.many(prompts), self.reader.many([""])
        sampling.sample(self.model, captions, start, self.sigmas, guidance=self.guidance, empty=empty, path=path)
        return path, prompts

    def picture_chunk(self, number: int, size: tuple[int, int], count: int, seed: int) -> Chunk:
        """The latents at the end."""
        path, prompts = self.paint(number, size, count, seed)
        return {"latents": path[-1].cpu(), "prompts": prompts}

    def path_chunk(self, number: int, size: tuple[int, int], count: int, seed: int) -> Chunk:
        """All latents on the way, float16 [count, levels, channels, height, width]."""
        path, prompts = self.paint(number, size, count, seed)
        return {"latents": torch.stack(path, 1).half().cpu(), "prompts": prompts}


class Samples:
    """A whole set in memory: latents by size, and captions by number."""

    def __init__(self, folders: Sequence[tuple[Path, Plan]]) -> None:
        parts: list[list[Tensor]] = [[] for _ in SIZES]
        numbers: list[list[int]] = [[] for _ in SIZES]
        self.prompts: list[str] = [""]
        seen = {"": 0}
        for folder, plan in folders:
            for number, size in enumerate(plan.sizes()):
                chunk = torch.load(folder / f"{number:04}.pt", weights_only=True)
                group = SIZES.index(size)
                parts[group].append(chunk["latents"])
                for prompt in chunk["prompts"]:
                    if prompt not in seen:
                        seen[prompt] = len(self.prompts)
                        self.prompts.append(prompt)
                    numbers[group].append(seen[prompt])
        self.latents = [torch.cat(part) if part else torch.empty(0) for part in parts]
        self.numbers = [torch.tensor(group) for group in numbers]

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents of one size and the numbers of their prompts."""
        shares = torch.tensor([share if len(group) else 0 for share, group in zip(SHARES, self.numbers, strict=True)])
        group = int(torch.multinomial(shares.float(), 1, generator=generator))
        index = torch.randint(len(self.numbers[group]), (batch,), generator=generator)
        return self.latents[group][index], self.numbers[group][index]
