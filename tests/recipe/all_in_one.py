"""Small all-in-one checkpoints with the names of the published ones."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

UNET = "model.diffusion_model."
BESIDE = ("first_stage_model.", "conditioner.", "model_ema.", "alphas_cumprod", "v_pred", "ztsnr", "global_step")


def sdxl(path: Path, seed: int = 0, *, flags: bool = True, metadata: dict[str, str] | None = None) -> Path:
    """SDXL's parts, each in a dtype that a cast would change: UNet, both text encoders, VAE, EMA, schedule, flags."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    tensors = {
        f"{UNET}input_blocks.0.0.weight": some(32, 4, 3, 3),
        f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight": some(64, 64),
        f"{UNET}middle_block.1.transformer_blocks.0.ff.net.2.weight": some(64, 128),
        f"{UNET}out.0.weight": some(32),
        "model_ema.diffusion_modelinput_blocks00weight": some(32, 4, 3, 3, dtype=torch.float32),
        "model_ema.decay": torch.tensor(0.9999),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": some(64, 64),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": some(256, 64),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": some(192, 64),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6052),
        "first_stage_model.decoder.mid.attn_1.q.weight": some(64, 64, 1, 1, dtype=torch.float32),
        "alphas_cumprod": torch.linspace(1, 0, 1000, dtype=torch.float64),
        "global_step": torch.tensor(470000),
    }
    if flags:
        tensors |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(tensors, path, metadata=metadata)
    return path
