"""Pipeline folders for tests: the embedded family's architecture with random weights, `base` (shift 6) and `turbo` (3)."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import ZImagePipeline

from mergetool.lab.training import models


def family(folder: Path) -> Path:
    """Two pipeline folders that share text encoder and VAE; pictures from them mean nothing."""
    torch.manual_seed(0)
    tokenizer = models.tokenizer(folder / "tokenizer")
    vae = models.vae()
    vae.register_to_config(scaling_factor=1.5, shift_factor=0.1)
    encoder = models.text_encoder(len(tokenizer))
    for name, shift in (("base", 6.0), ("turbo", 3.0)):
        models.save(
            folder / name,
            ZImagePipeline(
                scheduler=models.scheduler(shift),
                vae=vae,
                text_encoder=encoder,
                tokenizer=tokenizer,
                transformer=models.transformer(),
            ),
        )
    return folder
