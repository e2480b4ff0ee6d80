"""Small models of the families in use, by the names that ComfyUI's and diffusers' own classes give their tensors.

A row is the family, ComfyUI's class and its configuration, diffusers' class and its configuration. Both describe one model: they have as many
parameters, but for the width of one feed-forward, which ComfyUI rounds otherwise, and one embedder.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import torch

from tests.oracles.process import ComfyUI

Shapes = dict[str, tuple[int, ...]]
LAYOUTS = ("comfyui", "diffusers")
_FLUX = {"in_channels": 16, "out_channels": 16, "context_in_dim": 32, "hidden_size": 96, "mlp_ratio": 4.0, "num_heads": 6, "depth": 1,
         "depth_single_blocks": 2, "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": [], "vec_in_dim": 24}  # fmt: skip
_HEADS = {"attention_head_dim": 16, "num_attention_heads": 6}
_D_FLUX = {**_HEADS, "num_layers": 1, "num_single_layers": 2, "joint_attention_dim": 32, "axes_dims_rope": [4, 6, 6]}
_QWEN = {**_HEADS, "in_channels": 16, "num_layers": 2, "joint_attention_dim": 64, "axes_dims_rope": [4, 6, 6]}
_HIDREAM = {**_HEADS, "patch_size": 2, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "caption_channels": [64, 64], "text_emb_dim": 64,
            "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": [8, 8], "max_resolution": [8, 8], "llama_layers": [0, 1]}  # fmt: skip
_NEXT_DIT = {"patch_size": 2, "in_channels": 16, "dim": 96, "n_layers": 2, "n_refiner_layers": 1, "qk_norm": True, "cap_feat_dim": 64,
             "axes_lens": [8, 8, 8]}  # fmt: skip

FAMILIES: Mapping[str, tuple[str, str, dict[str, Any], str, dict[str, Any]]] = {
    "SDXL": (
        "modules.diffusionmodules.openaimodel", "UNetModel",
        {"image_size": 32, "in_channels": 4, "model_channels": 32, "out_channels": 4, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4],
         "num_head_channels": 16, "use_spatial_transformer": True, "transformer_depth": [0, 0, 1, 1, 1, 1], "transformer_depth_middle": 1,
         "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1], "context_dim": 32, "use_linear_in_transformer": True,
         "num_classes": "sequential", "adm_in_channels": 48},
        "UNet2DConditionModel",
        {"sample_size": 32, "block_out_channels": [32, 64, 128], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
         "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "transformer_layers_per_block": [1, 1, 1],
         "attention_head_dim": [2, 4, 8], "cross_attention_dim": 32, "use_linear_projection": True, "addition_embed_type": "text_time",
         "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48},
    ),
    "Flux.1": (
        "flux.model", "Flux", {**_FLUX, "guidance_embed": True},
        "FluxTransformer2DModel", {**_D_FLUX, "in_channels": 64, "pooled_projection_dim": 24, "guidance_embeds": True},
    ),
    "Flux.2": (
        "flux.model", "Flux",
        {**_FLUX, "in_channels": 32, "out_channels": 32, "context_in_dim": 64, "mlp_ratio": 3.0, "axes_dim": [4, 4, 4, 4], "patch_size": 1,
         "qkv_bias": False, "guidance_embed": False, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "vec_in_dim": None},
        "Flux2Transformer2DModel",
        {**_D_FLUX, "in_channels": 32, "joint_attention_dim": 64, "axes_dims_rope": [4, 4, 4, 4], "guidance_embeds": False},
    ),
    "Qwen-Image": ("qwen_image.model", "QwenImageTransformer2DModel", _QWEN, "QwenImageTransformer2DModel", _QWEN),
    "Chroma": (
        "chroma.model", "Chroma", {**_FLUX, "in_dim": 64, "out_dim": 96, "hidden_dim": 96, "n_layers": 2},
        "ChromaTransformer2DModel", {**_D_FLUX, "approximator_hidden_dim": 96, "approximator_layers": 2},
    ),
    "Wan": (
        "wan.model", "WanModel", {"dim": 96, "ffn_dim": 192, "freq_dim": 32, "text_dim": 64, "num_heads": 4, "num_layers": 2},
        "WanTransformer3DModel",
        {"num_attention_heads": 4, "attention_head_dim": 24, "text_dim": 64, "freq_dim": 32, "ffn_dim": 192, "num_layers": 2},
    ),
    "SD3.5": (
        "modules.diffusionmodules.mmdit", "MMDiT",
        {"input_size": None, "depth": 2, "in_channels": 16, "adm_in_channels": 64, "pos_embed_max_size": 8, "num_patches": 64, "qk_norm": "rms",
         "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
         "x_block_self_attn_layers": [0]},
        "SD3Transformer2DModel",
        {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 64, "caption_projection_dim": 128,
         "pooled_projection_dim": 64, "pos_embed_max_size": 8, "dual_attention_layers": [0], "qk_norm": "rms_norm"},
    ),
    "Lumina-Image 2": (
        "lumina.model", "NextDiT", {**_NEXT_DIT, "n_heads": 6, "n_kv_heads": 2, "axes_dims": [4, 6, 6]},
        "Lumina2Transformer2DModel",
        {"hidden_size": 96, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 6, "num_kv_heads": 2, "axes_dim_rope": [4, 6, 6],
         "cap_feat_dim": 64},
    ),
    "Z-Image": (
        "lumina.model", "NextDiT",
        {**_NEXT_DIT, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [8, 12, 12], "z_image_modulation": True, "pad_tokens_multiple": 32,
         "ffn_dim_multiplier": 8 / 3},
        "ZImageTransformer2DModel",
        {"dim": 96, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64, "axes_dims": [8, 12, 12]},
    ),
    "HiDream": ("hidream.model", "HiDreamImageTransformer2DModel", _HIDREAM, "HiDreamImageTransformer2DModel", _HIDREAM),
    "LTX": (
        "lightricks.model", "LTXVModel", {**_HEADS, "in_channels": 32, "cross_attention_dim": 96, "caption_channels": 64, "num_layers": 2},
        "LTXVideoTransformer3DModel",
        {**_HEADS, "in_channels": 32, "out_channels": 32, "cross_attention_dim": 96, "num_layers": 2, "caption_channels": 64},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Layouts:
    """The tensors of one model in each layout."""

    comfyui: Shapes
    diffusers: Shapes

    def of(self, layout: str) -> Shapes:
        return self.comfyui if layout == "comfyui" else self.diffusers

    @property
    def in_common(self) -> float:
        """The share of the parameters whose names are the same in both."""
        both = self.comfyui.keys() & self.diffusers.keys()
        return sum(prod(self.diffusers[name]) for name in both) / sum(map(prod, self.diffusers.values()))


@cache
def layouts(oracle: ComfyUI, family: str) -> Layouts:
    """What the two programs' classes call the tensors of a family's model, with true proportions at a small size."""
    import diffusers

    module, model, config, name, theirs = FAMILIES[family]
    answer = oracle.ask("architecture", module=module, model=model, config=config)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one class asks for a module by its old place
        made = getattr(diffusers, name)(**theirs)
    own = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    return Layouts({name: tuple(shape) for name, shape in answer["tensors"].items()}, own)
