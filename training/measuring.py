"""Adherence of a member, and its sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training import checker, sampling
from training.world import SIZES, Scene

PART = 64
IN_SHEET = 32


def scenes(count: int, seed: int = 9) -> list[Scene]:
    """The scenes that every member is measured on: a quarter of one figure, a quarter of held-out pairs, half of other pairs."""
    generator = np.random.default_rng(seed)
    found: list[Scene] = []
    while len(found) < count:
        kind = len(found) % 4
        scene = Scene.random(generator, held_out=kind == 3)
        if (scene.relation is None) == (kind == 0):
            found.append(scene)
    return found


def draw(
    model: ZImageTransformer2DModel,
    vae: AutoencoderKL,
    reader: sampling.Reader,
    wanted: Sequence[Scene],
    *,
    steps: int,
    guidance: float,
    shift: float,
    size: tuple[int, int] = SIZES[0],
    seed: int = 9,
) -> NDArray[np.uint8]:
    """One picture of each scene; the noise depends on the seed and the scene's place only."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    levels = sampling.grid(steps, shift)
    empty = reader.many([""])
    parts = []
    for start in range(0, len(wanted), PART):
        part = wanted[start : start + PART]
        noise = sampling.noise(len(part), size, generator).to(device)
        captions = reader.many([scene.prompt for scene in part])
        latents = sampling.sample(model, captions, noise, levels, guidance=guidance, empty=empty)
        parts.append(sampling.decode(vae, latents))
    return np.concatenate(parts)


def shares(pictures: NDArray[np.uint8], wanted: Sequence[Scene]) -> dict[str, float]:
    """Shares of pictures that show their prompt, of all and by kind of prompt, and that have a character."""
    found = [checker.read(picture) for picture in pictures]
    right = np.array([reading.matches(scene) for reading, scene in zip(found, wanted, strict=True)])
    single = np.array([scene.relation is None for scene in wanted])
    held = np.array([scene.held_out for scene in wanted])
    kinds = {"one": single, "two": ~single & ~held, "held_out": held}
    return {
        "adherence": round(float(right.mean()), 4),
        **{name: round(float(right[kind].mean()), 4) for name, kind in kinds.items() if kind.any()},
        "striped": round(float(np.mean([reading.striped for reading in found])), 4),
        "hollow": round(float(np.mean([reading.hollow for reading in found])), 4),
    }


def sheet(
    pictures: NDArray[np.uint8], wanted: Sequence[Scene], path: Path, *, columns: int = 8, scale: int = 2
) -> None:
    """Pictures with their prompts in short; a red bar under what the checker reads otherwise."""
    height, width = (side * scale for side in pictures.shape[1:3])
    rows = -(-len(wanted) // columns)
    image = Image.new("RGB", (columns * (width + 8), rows * (height + 34)), "white")
    pen = ImageDraw.Draw(image)
    for number, (picture, scene) in enumerate(zip(pictures, wanted, strict=True)):
        x, y = number % columns * (width + 8) + 4, number // columns * (height + 34) + 4
        image.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if not checker.read(picture).matches(scene):
            pen.rectangle((x, y + height, x + width - 1, y + height + 3), fill="red")
        lines = [f"{figure.colour} {figure.shape}" for figure in scene.figures]
        mark = {"left of": "< ", "above": "^ ", None: ""}[scene.relation]
        pen.text((x, y + height + 4), lines[0], fill="black")
        pen.text((x, y + height + 15), f"{mark}{lines[1] if len(lines) > 1 else ''} / {scene.ground}", fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(128).save(path, optimize=True)
