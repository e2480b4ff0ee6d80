"""Small pipelines of diffusers with random weights, as folders, of seven families. Their pictures mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 32


def flux(folder: Path, *, guidance: bool = True, seed: int = 0) -> Path:
    """Flux.1: two blocks; without a ``guidance`` embedder it is schnell."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(4),
        text_encoder=CLIPTextModel(_clip()),
        tokenizer=_clip_tokenizer(folder),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )
    return _saved(pipeline, folder)


def chroma(folder: Path) -> Path:
    """Chroma: two blocks, a small approximator, and latents of 8 channels."""
    torch.manual_seed(1)
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=32,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(8),
        text_encoder=_t5(),
        tokenizer=_t5_tokenizer(),
        transformer=transformer,
    )
    return _saved(pipeline, folder)


def sdxl(folder: Path) -> Path:
    """SDXL: two levels of a UNet, two CLIP encoders."""
    torch.manual_seed(2)
    pipeline = StableDiffusionXLPipeline(
        unet=_xl_unet(context=2 * WIDTH, numbers=6),
        scheduler=_euler(),
        vae=_vae(4, scaling=0.13),
        text_encoder=CLIPTextModel(_clip()),
        tokenizer=_clip_tokenizer(folder),
        text_encoder_2=CLIPTextModelWithProjection(_clip()),
        tokenizer_2=_clip_tokenizer(folder),
    )
    return _saved(pipeline, folder)


def sdxl_refiner(folder: Path, base: Path) -> Path:
    """SDXL's refiner: it reads the second text encoder alone, is told how fine pictures are, and has the VAE of ``base``."""
    torch.manual_seed(3)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        unet=_xl_unet(context=WIDTH, numbers=5),
        scheduler=_euler(),
        vae=AutoencoderKL.from_pretrained(base / "vae"),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=CLIPTextModelWithProjection(_clip()),
        tokenizer_2=_clip_tokenizer(folder),
        requires_aesthetics_score=True,
    )
    return _saved(pipeline, folder)


def sd15(folder: Path) -> Path:
    """Stable Diffusion 1.5: two levels of a UNet, one CLIP encoder, no checker of pictures."""
    torch.manual_seed(4)
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
        ),
        scheduler=_euler(),
        vae=_vae(4, scaling=0.18),
        text_encoder=CLIPTextModel(_clip()),
        tokenizer=_clip_tokenizer(folder),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _saved(pipeline, folder)


def sd3(folder: Path) -> Path:
    """Stable Diffusion 3.5: one block, three text encoders."""
    torch.manual_seed(5)
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            out_channels=4,
            qk_norm="rms_norm",
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(4),
        text_encoder=CLIPTextModelWithProjection(_clip()),
        tokenizer=_clip_tokenizer(folder),
        text_encoder_2=CLIPTextModelWithProjection(_clip()),
        tokenizer_2=_clip_tokenizer(folder),
        text_encoder_3=_t5(2 * WIDTH),
        tokenizer_3=_t5_tokenizer(),
    )
    return _saved(pipeline, folder)


def qwen_image(folder: Path) -> Path:
    """Qwen-Image: two blocks, a small Qwen2.5-VL, and a VAE that is made for videos."""
    torch.manual_seed(6)
    pipeline = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKLQwenImage(base_dim=24, z_dim=4, **_VIDEO),
        text_encoder=Qwen2_5_VLForConditionalGeneration(_qwen2_5_vl()),
        tokenizer=_t5_tokenizer(length=1024),
    )
    return _saved(pipeline, folder)


def wan(folder: Path) -> Path:
    """Wan 2.1: two blocks, UMT5."""
    torch.manual_seed(7)
    pipeline = WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=32,
            ffn_dim=32,
            num_layers=2,
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=AutoencoderKLWan(base_dim=3, z_dim=4, **_VIDEO),
        text_encoder=UMT5EncoderModel(
            UMT5Config(d_model=WIDTH, d_ff=37, d_kv=8, num_heads=4, num_layers=2, vocab_size=40)
        ),
        tokenizer=_t5_tokenizer(length=512),
    )
    return _saved(pipeline, folder)


_VIDEO: Mapping[str, Any] = {
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 4,
    "latents_std": [1.0] * 4,
}


def _xl_unet(*, context: int, numbers: int) -> UNet2DConditionModel:
    """A UNet that is told ``numbers`` about a picture's size."""
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=numbers * 8 + WIDTH,
        cross_attention_dim=context,
    )


def _euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1, beta_schedule="scaled_linear")


def _qwen2_5_vl() -> Qwen2_5_VLConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "vocab_size": 40,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            "rope_theta": 1000000.0,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        vision_start_token_id=34,
        vision_end_token_id=35,
        vision_token_id=36,
        image_token_id=37,
        video_token_id=38,
    )


def _saved(pipeline: DiffusionPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def _vae(channels: int, *, scaling: float = 0.36) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=scaling,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip() -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        vocab_size=len(_clip_vocabulary()),
        projection_dim=WIDTH,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _clip_vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return {word: number for number, word in enumerate(words)}


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=77)


def _t5(width: int = WIDTH) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            d_model=width, d_ff=37, d_kv=8, num_heads=4, num_layers=2, vocab_size=40, feed_forward_proj="gated-gelu"
        )
    )


def _t5_tokenizer(length: int = 64) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {
        letter: 3 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )
