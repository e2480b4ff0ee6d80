"""Every class of ComfyUI's list of models, with what it needs to be built small: the configuration that its detection reads off a file.

A row is a class of ``comfy.supported_models`` and what its configuration has beside the class's own entries. A class without a row is built as it comes.
ComfyUI's detection gives every one of them its class back, so that the rows are as its files are; tests/arch/test_named.py holds that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.oracles.process import ComfyUI

Config = dict[str, Any]
_UNET: Config = {"image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4],
                 "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_output": [1] * 9 + [0] * 3, "transformer_depth_middle": 1,
                 "use_spatial_transformer": True, "legacy": False}  # fmt: skip
_ADM: Config = {**_UNET, "num_classes": "sequential"}
_XL: Config = {**_ADM, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth_middle": 10}
_VIDEO: Config = {**_ADM, "extra_ff_mix_layer": True, "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
                  "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False}  # fmt: skip
_FLUX: Config = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24,
                 "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "txt_ids_dims": []}  # fmt: skip
_CHROMA: Config = {**_FLUX, "in_dim": 64, "out_dim": 3072, "hidden_dim": 5120, "n_layers": 5}
_HUNYUAN: Config = {"in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
                    "mlp_ratio": 4.0, "num_heads": 24, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "qkv_bias": True,
                    "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
                    "meanflow_sum": False}  # fmt: skip
_HUNYUAN15: Config = {**_HUNYUAN, "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "guidance_embed": False,
                      "byt5": True, "use_cond_type_embedding": True, "meanflow_sum": True}  # fmt: skip
_COSMOS: Config = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1,
                   "model_channels": 4096, "block_config": "FA-CA-MLP", "num_blocks": 2, "num_heads": 32, "concat_padding_mask": True,
                   "pos_emb_cls": "rope3d", "pos_emb_interpolation": "crop", "block_x_format": "THWBD", "affline_emb_norm": True,
                   "use_adaln_lora": True, "adaln_lora_dim": 256, "extra_per_block_abs_pos_emb": True,
                   "extra_per_block_abs_pos_emb_type": "learnable"}  # fmt: skip
_PREDICT2: Config = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
                     "patch_temporal": 1, "model_channels": 2048, "num_blocks": 2, "num_heads": 16, "concat_padding_mask": True,
                     "crossattn_emb_channels": 1024, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "adaln_lora_dim": 256}  # fmt: skip

_SHALLOW = [
    "LTXV",
    "LTXAV",
    "CogVideoX_T2V",
    "CogVideoX_I2V",
    "CogVideoX_Inpaint",
    "Lens",
    "MageFlow",
    "QwenImage",
    "MiniMaxH3",
    "WAN21_T2V",
    "WAN22_T2V",
    "WAN21_CausalAR_T2V",
    "WAN21_I2V",
    "WAN21_FunControl2V",
    "WAN21_Camera",
    "WAN22_Camera",
    "WAN21_FlowRVS",
    "WAN21_SCAIL",
    "WAN21_SCAIL2",
    "JoyImage",
    "Ideogram4",
    "Omnigen2",
    "ErnieImage",
    "ACEStep",
]

CONFIGS: Mapping[str, Config] = {
    "LotusD": {**_ADM, "context_dim": 1024},
    "Stable_Zero123": _UNET,
    "SD15_instructpix2pix": _UNET,
    "SD15": _UNET,
    "SD20": _UNET,
    "SD21UnclipL": _ADM,
    "SD21UnclipH": _ADM,
    "SDXL_instructpix2pix": {**_XL, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]},
    "SDXLRefiner": {**_ADM, "transformer_depth_output": [0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0], "transformer_depth_middle": 4},
    "SDXL": {**_XL, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10]},
    "SSD1B": {**_XL, "transformer_depth_output": [0, 0, 0, 1, 1, 2, 10, 4, 4], "transformer_depth_middle": -1},
    "KOALA_700M": {**_XL, "num_res_blocks": [1, 1, 1], "transformer_depth_output": [0, 0, 2, 2, 5, 5], "transformer_depth_middle": -2},
    "KOALA_1B": {**_XL, "num_res_blocks": [1, 1, 1], "transformer_depth_output": [0, 0, 2, 2, 6, 6], "transformer_depth_middle": 6},
    "Segmind_Vega": {**_XL, "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": -1},
    "SD_X4Upscaler": {**_ADM, "num_classes": 1000, "transformer_depth": [0, 0, 1, 1, 1, 1, 1, 1], "channel_mult": [1, 2, 2, 4],
                      "transformer_depth_output": [1] * 9 + [0] * 3, "disable_self_attentions": [True, True, True, False]},
    "SV3D_u": _VIDEO,
    "SV3D_p": _VIDEO,
    "SVD_img2vid": _VIDEO,
    "SD3": {"input_size": None, "depth": 24, "adm_in_channels": 2048, "pos_embed_max_size": 8, "num_patches": 64,
            "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 1536}}},
    "FluxInpaint": _FLUX,
    "Flux": _FLUX,
    "LongCatImage": {**_FLUX, "txt_ids_dims": [1, 2]},
    "FluxSchnell": _FLUX,
    "GenmoMochi": {"depth": 2, "patch_size": 2, "num_heads": 24, "hidden_size_x": 3072, "hidden_size_y": 1536, "mlp_ratio_x": 4.0, "mlp_ratio_y": 4.0,
                   "in_channels": 12, "qk_norm": True, "qkv_bias": False, "out_bias": True, "patch_embed_bias": True, "timestep_mlp_bias": True,
                   "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 4096, "t5_token_length": 256},
    "HunyuanVideo15_SR_Distilled": {**_HUNYUAN15, "in_channels": 98},
    "HunyuanVideo15": _HUNYUAN15,
    "HunyuanImage21Refiner": {**_HUNYUAN, "in_channels": 128, "out_channels": 64, "guidance_embed": False, "meanflow": True},
    "HunyuanImage21": {**_HUNYUAN, "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [64, 64], "guidance_embed": False,
                       "byt5": True},
    "HunyuanVideoSkyreelsI2V": _HUNYUAN,
    "HunyuanVideoI2V": _HUNYUAN,
    "HunyuanVideo": _HUNYUAN,
    "CosmosT2V": _COSMOS,
    "CosmosI2V": _COSMOS,
    "CosmosT2IPredict2": _PREDICT2,
    "CosmosI2VPredict2": _PREDICT2,
    "Anima": _PREDICT2,
    "ZImagePixelSpace": {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512],
                         "cap_feat_dim": 2560, "n_layers": 2, "qk_norm": True, "z_image_modulation": True, "patch_size": 32, "in_channels": 3},
    "ZImage": {"dim": 3840, "n_heads": 30, "n_kv_heads": 30, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "in_channels": 16,
               "cap_feat_dim": 2560, "n_layers": 2, "qk_norm": True, "z_image_modulation": True, "pad_tokens_multiple": 32},
    "Lumina2": {"dim": 2304, "n_heads": 24, "n_kv_heads": 8, "axes_dims": [32, 32, 32], "axes_lens": [300, 512, 512], "in_channels": 16,
                "cap_feat_dim": 2304, "n_layers": 2, "qk_norm": True},
    "HiDream": {"attention_head_dim": 128, "axes_dims_rope": [64, 32, 32], "caption_channels": [4096, 4096], "max_resolution": [128, 128],
                "in_channels": 16, "llama_layers": [0, 1], "num_attention_heads": 20, "num_routed_experts": 4, "num_activated_experts": 2,
                "num_layers": 1, "num_single_layers": 1, "out_channels": 16, "patch_size": 2, "text_emb_dim": 2048},
    "Chroma": _CHROMA,
    "ChromaRadiance": {**_CHROMA, "in_channels": 3, "out_channels": 3, "patch_size": 16, "nerf_hidden_size": 64, "nerf_mlp_ratio": 4, "nerf_depth": 2,
                       "nerf_max_freqs": 8, "nerf_tile_size": 512, "nerf_final_head_type": "conv", "nerf_embedder_dtype": None, "use_x0": True,
                       "use_sequential_txt_ids": False},
    "Flux2": {**_FLUX, "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 15360, "hidden_size": 6144, "mlp_ratio": 3.0,
              "num_heads": 48, "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False, "guidance_embed": True,
              "global_modulation": True, "mlp_silu_act": True, "ops_bias": False},
    "SeedVR2": {"vid_dim": 2560, "heads": 20, "num_layers": 32, "norm_eps": 1e-5, "mlp_type": "swiglu", "vid_out_norm": True},
    "Stable_Cascade_C": {"blocks": [[1] * 2] * 2},
    "Stable_Cascade_B": {"blocks": [[1] * 4] * 2},
    **{name: {"num_layers": 2} for name in _SHALLOW},
    "Boogu": {"num_layers": 2, "num_double_stream_layers": 1},
    **{name: {"num_visual_blocks": 1, "num_text_blocks": 1} for name in ("Kandinsky5", "Kandinsky5Image")},
    "AuraFlow": {"n_layers": 2, "n_double_layers": 1},
    "Krea2": {"layers": 2},
    "PixArtSigma": {"micro_condition": False},
    "HunyuanDiT": {"hidden_size": 1408, "num_heads": 16, "depth": 2},
    "HunyuanDiT1": {"hidden_size": 1408, "num_heads": 16, "depth": 2, "size_cond": True, "use_style_cond": True},
    "WAN21_Vace": {"num_layers": 2, "vace_layers": 1, "vace_in_dim": 96},
    "StableAudio3": {"depth": 2, "global_cond_type": "adaLN", "timestep_features_type": "expo"},
    "StableAudio": {"depth": 2, "timestep_features_type": "learned"},
    "ACEStep15": {"hidden_size": 256, "text_hidden_dim": 64, "timbre_hidden_dim": 64, "audio_acoustic_hidden_dim": 64, "num_dit_layers": 1,
                  "num_lyric_layers": 1, "num_timbre_layers": 1, "num_tokenizer_layers": 1, "num_heads": 2, "num_kv_heads": 1,
                  "intermediate_size": 256, "fsq_dim": 256, "encoder_hidden_size": 256, "encoder_intermediate_size": 256, "encoder_num_heads": 2},
}  # fmt: skip

KIN: Mapping[str, tuple[str, Config]] = {
    "NewBie": ("Lumina2", {**CONFIGS["Lumina2"], "clip_text_dim": 1024}),
    "Z-Image Omni": ("ZImage", {**CONFIGS["ZImage"], "siglip_feat_dim": 1152}),
    "Ovis": ("FluxSchnell", {**_FLUX, "context_in_dim": 2048, "vec_in_dim": None, "yak_mlp": True, "txt_norm": True, "txt_ids_dims": [1, 2]}),
}  # fmt: skip
"""Models that ComfyUI has no class of their own for."""
TRAINED: Mapping[str, tuple[str, Config]] = {
    "Krea 2": ("Krea2", {"features": 64, "tdim": 32, "txtdim": 64, "heads": 2, "kvheads": 1, "layers": 1, "txtlayers": 2, "txtheads": 2, "txtkvheads": 1}),
    "OmniGen2": (
        "Omnigen2",
        {"hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32,
         "axes_dim_rope": [16, 8, 8], "axes_lens": [8, 8, 8], "text_feat_dim": 64},
    ),
    "LTX-Video": (
        "LTXV",
        {"in_channels": 32, "cross_attention_dim": 64, "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": 64, "num_layers": 1},
    ),
    "HiDream-I1": (
        "HiDream",
        {**CONFIGS["HiDream"], "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": [64, 64], "text_emb_dim": 64,
         "axes_dims_rope": [16, 8, 8]},
    ),
    "Stable Audio": (
        "StableAudio",
        {"depth": 1, "timestep_features_type": "learned", "embed_dim": 64, "cond_token_dim": 64, "global_cond_dim": 64, "num_heads": 2},
    ),
}  # fmt: skip
"""Of named families, a class and a configuration small enough to write: LoRAs of these are loaded by ComfyUI."""
PREFIX = {"PixelDiTT2I": "core."}
"""What files have before the names of a class, which it takes off."""


@dataclass(frozen=True)
class Supported:
    """A model that ComfyUI builds: its tensors, the weights that a quantised file may have, and the class that it detects."""

    tensors: Mapping[str, tuple[int, ...]]
    linear: frozenset[str]
    detected: str


@cache
def supported(oracle: ComfyUI) -> dict[str, Supported]:
    """All of ComfyUI's list, and `KIN`, by name."""
    kin = {name: [of, config] for name, (of, config) in KIN.items()}
    answer = oracle.ask("supported", configs=CONFIGS, kin=kin, prefixes=PREFIX)["models"]
    return {
        name: Supported(
            {tensor: tuple(shape) for tensor, shape in one["tensors"].items()},
            frozenset(one["linear"]),
            one["detected"],
        )
        for name, one in answer.items()
    }


def tensors_of(oracle: ComfyUI, of: str, config: Config) -> dict[str, tuple[int, ...]]:
    """The tensors of a class of the list with another configuration."""
    made = oracle.ask("class_of", of=of, config=config)["tensors"]
    return {name: tuple(shape) for name, shape in made.items()}


def packed(oracle: ComfyUI, name: str, weights: Collection[str]) -> bool:
    """Whether ComfyUI detects the same model, sizes and all, with these weights stored two values a byte, as 4-bit containers have them."""
    same: bool = oracle.ask("packed", name=name, weights=sorted(weights))["same"]
    return same
