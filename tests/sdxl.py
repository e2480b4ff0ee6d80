"""Small SDXL checkpoints for tests: the names of the real classes, weights that are a function of the seed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mergetool.arch.families.sdxl import SDXL_UNET

Shapes = dict[str, tuple[int, ...]]
UNET = "model.diffusion_model."

PUBLISHED: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""unet/config.json of the published SDXL."""
SMALL: Mapping[str, Any] = {
    **PUBLISHED,
    "block_out_channels": [32, 64, 128],
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [1, 1, 2],
}
"""All of its blocks, narrow."""
PUBLISHED_IN_COMFYUI: Mapping[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "model_channels": 320,
    "out_channels": 4,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
"""The arguments of ComfyUI's class for it."""


def shapes(config: Mapping[str, Any] = SMALL, layout: str = "diffusers", name: str = "UNet2DConditionModel") -> Shapes:
    """The tensors of a class of diffusers, under the names of a layout of SDXL or its own, in its order."""
    own = _built(name, repr(dict(config)))
    if layout == "own":
        return own
    return {SDXL_UNET.stored_name(part, layout): shape for part, shape in own.items()}


@cache
def _built(name: str, config: str) -> Shapes:
    import ast

    import diffusers

    with torch.device("meta"):
        made = getattr(diffusers, name)(**ast.literal_eval(config))
    return {part: tuple(tensor.shape) for part, tensor in made.state_dict().items()}


def values(seed: int, config: Mapping[str, Any] = SMALL, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights by their names in diffusers."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes(config).items()}


def checkpoint(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    layout: str = "comfyui",
    prefix: str = "",
    beside: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """A file of ``tensors``, given by their names in diffusers, in a layout and under a prefix; ``beside`` as they are named."""
    named = {prefix + SDXL_UNET.stored_name(name, layout): tensor for name, tensor in tensors.items()}
    save_file({**named, **(beside or {})}, path)
    return path


def encoders(seed: int) -> dict[str, torch.Tensor]:
    """Some of what an all-in-one file has beside: CLIP-L, CLIP-G (of OpenCLIP, fused), the VAE, and markers."""
    generator = torch.Generator().manual_seed(1000 + seed)
    clip_l, clip_g = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
    sizes = {
        f"{clip_l}encoder.layers.0.mlp.fc1.weight": (256, 64),
        f"{clip_l}encoder.layers.0.self_attn.q_proj.weight": (64, 64),
        f"{clip_g}transformer.resblocks.0.attn.in_proj_weight": (192, 64),
        f"{clip_g}transformer.resblocks.0.mlp.c_fc.weight": (256, 64),
        f"{clip_g}text_projection": (64, 64),
        "first_stage_model.decoder.mid.attn_1.q.weight": (64, 64, 1, 1),
    }
    found = {name: torch.randn(shape, generator=generator).half() for name, shape in sizes.items()}
    found[f"{clip_l}embeddings.position_ids"] = torch.arange(77)[None]
    return found
