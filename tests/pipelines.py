"""Pipeline folders for tests: the embedded family's architecture with random weights, `base` (shift 6) and `turbo` (3)."""

from __future__ import annotations

import re
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


def as_single_file(state: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """The tensors of an AutoencoderKL under the names of single files (``ae.safetensors``), that of latent diffusion."""
    found = {}
    for name, tensor in state.items():
        for pattern, replacement in _SINGLE_FILE_VAE:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"\.up\.(\d+)\.", lambda m: f".up.{blocks - 1 - int(m[1])}.", name)
        attention = ".mid.attn_1." in name and name.endswith("weight") and tensor.ndim == 2
        found[name] = tensor[:, :, None, None].contiguous() if attention else tensor
    return found


_SINGLE_FILE_VAE = (
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2.\3sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.group_norm\.", ".mid.attn_1.norm."),
    (r"\.mid_block\.attentions\.0\.to_([qkv])\.", r".mid.attn_1.\1."),
    (r"\.mid_block\.attentions\.0\.to_out\.0\.", ".mid.attn_1.proj_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
)
