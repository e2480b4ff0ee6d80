"""The register of families that have a name and no table: one row each.

A row has the tensors that show such a model, first as ComfyUI's own code names them (``comfy/model_detection.py`` looks for most of these), then as
diffusers' class does where there is one. It merges under its own names as a generic model does. Nothing is proved of its layouts, or of the LoRAs that
programs load for it, but what tests/arch/test_named.py asks ComfyUI.
"""

from __future__ import annotations

from mergetool.arch.generic import NamedFamily
from mergetool.arch.signs import Like, Signature, Variant


def _comfyui(*has: str, lacks: tuple[str, ...] = (), **shapes: Like) -> Signature:
    """A sign of a model in ComfyUI's names. ``shapes`` are of tensors whose dots are spelled as two underscores."""
    return _sign("comfyui", has, lacks, shapes)


def _diffusers(*has: str, lacks: tuple[str, ...] = (), **shapes: Like) -> Signature:
    """A sign of a model in diffusers' names; see `_comfyui`."""
    return _sign("diffusers", has, lacks, shapes)


def _both(*has: str) -> Signature:
    """A sign of a model whose names are the same in both."""
    return _sign("both", has, (), {})


def _sign(layout: str, has: tuple[str, ...], lacks: tuple[str, ...], shapes: dict[str, Like]) -> Signature:
    return Signature(
        layout, dict.fromkeys(has) | {_name(key): like for key, like in shapes.items()}, dict.fromkeys(lacks)
    )


def _kind(name: str, *has: str, lacks: tuple[str, ...] = (), **shapes: Like) -> Variant:
    return Variant(name, dict.fromkeys(has) | {_name(key): like for key, like in shapes.items()}, dict.fromkeys(lacks))


def _name(key: str) -> str:
    return key.replace("__", ".")


_LABEL, _DEEPEST = "label_emb.0.0.weight", "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
_TIMED, _D_TIMED = (
    "middle_block.1.time_stack.0.attn1.to_q.weight",
    "mid_block.attentions.0.temporal_transformer_blocks.0.attn1.to_q.weight",
)
_D_DEEPEST = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
_FIRST = "transformer_blocks.0.attn2.to_k.weight"
_NOT_SD2 = (
    _D_TIMED,
    "add_embedding.linear_1.weight",
    "transformer_in.norm.weight",
    "mid_block.motion_modules.0.proj_in.weight",
)
_REFINER, _D_REFINER = (
    "txt_in.individual_token_refiner.blocks.0.norm1.weight",
    "context_embedder.token_refiner.refiner_blocks.0.norm1.weight",
)
_VECTOR = ("vector_in.in_layer.weight", "vector_in.mlp.0.weight")
_KEY_NORM, _D_KEY_NORM = "double_blocks.0.img_attn.norm.key_norm.scale", "transformer_blocks.0.attn.norm_added_k.weight"
_FUSED = frozenset({"linear1", "linear2"})
"""Components of Flux' kin that are attention and feed-forward of a single block, as one."""

STABLE_DIFFUSION = (
    NamedFamily(
        "Stable Diffusion 2",
        Signature("comfyui", {"middle_block.1.proj_in.weight": (None, None), _DEEPEST: (None, 1024)}, {_TIMED: None}),
        Signature("diffusers", {"mid_block.attentions.0.proj_in.weight": (None, None), _D_DEEPEST: (None, 1024)}, dict.fromkeys(_NOT_SD2)),
        variants=(
            _kind("unCLIP-L", label_emb__0__0__weight=(None, 1536)),
            _kind("unCLIP-H", label_emb__0__0__weight=(None, 2048)),
            _kind("Lotus", label_emb__0__0__weight=(None, 4)),
            _kind("4x upscaler", input_blocks__0__0__weight=(None, 7, 3, 3)),
            _kind("inpainting", input_blocks__0__0__weight=(None, 9, 3, 3)),
            _kind("depth", input_blocks__0__0__weight=(None, 5, 3, 3)),
            _kind("2.0 or 2.1", input_blocks__0__0__weight=(None, 4, 3, 3)),
        ),
        unquantised=frozenset({f"input_blocks.{number}.1.{_FIRST}" for number in (1, 4)}),
    ),
    NamedFamily(
        "SDXL refiner",
        Signature("comfyui", {_LABEL: (None, 2560), _DEEPEST: (None, 1280)}),
        Signature("diffusers", {"add_embedding.linear_1.weight": (None, 2560), _D_DEEPEST: (None, 1280)}),
        unquantised=frozenset({f"input_blocks.4.1.{_FIRST}"}),
    ),
    NamedFamily(
        "Stable Video Diffusion",
        _comfyui("input_blocks.0.0.weight", _TIMED),
        _diffusers("conv_in.weight", _D_TIMED),
        variants=(
            _kind("SVD or SVD-XT", label_emb__0__0__weight=(None, 768)),
            _kind("SV3D-u", label_emb__0__0__weight=(None, 256)),
            _kind("SV3D-p", label_emb__0__0__weight=(None, 1280)),
        ),
        unquantised=frozenset({f"input_blocks.1.1.{_FIRST}"}),
    ),
    NamedFamily(
        "Stable Cascade",
        _comfyui("clf.1.weight", "embedding.1.weight"),
        variants=(_kind("stage C", "clip_txt_mapper.weight"), _kind("stage B", "clip_mapper.weight", "effnet_mapper.0.weight")),
        unquantised=frozenset({"down_blocks.1.0.channelwise.0.weight"}),
    ),
    NamedFamily(
        "Stable Audio",
        _comfyui("transformer.rotary_pos_emb.inv_freq", "to_timestep_embed.0.weight"),
        _diffusers("cross_attention_proj.0.weight", "timestep_proj.0.weight", "preprocess_conv.weight"),
        _diffusers("prompt_padding_embedding", "to_timestep_embed.0.weight", "to_global_embed.0.weight"),
        variants=(
            *(_kind("3", f"{place}global_cond_embedder.0.weight") for place in ("", "transformer.")),
            _kind("Open 1.0"),
        ),
    ),
)  # fmt: skip

IMAGES = (
    NamedFamily("AuraFlow", _comfyui("double_layers.0.attn.w1q.weight"), _diffusers("joint_transformer_blocks.0.attn.add_q_proj.weight", "register_tokens")),
    NamedFamily(
        "PixArt",
        _comfyui("t_block.1.weight", "y_embedder.y_embedding", "blocks.0.scale_shift_table"),
        _diffusers("adaln_single.emb.timestep_embedder.linear_1.bias", pos_embed__proj__weight=(1152, None, None, None)),
        variants=(
            _kind("Alpha", "ar_embedder.mlp.0.weight"),
            _kind("Alpha", "adaln_single.emb.aspect_ratio_embedder.linear_1.weight"),
            _kind("Sigma, or Alpha of 256 or 512 pixels"),
        ),
    ),
    NamedFamily(
        "HunyuanDiT",
        _comfyui("mlp_t5.0.weight", "text_embedding_padding", "extra_embedder.0.weight"),
        _diffusers("text_embedding_padding", "time_extra_emb.timestep_embedder.linear_1.weight"),
        variants=(
            _kind("1.0 or 1.1", "style_embedder.weight"),
            _kind("1.0 or 1.1", "time_extra_emb.style_embedder.weight"),
            _kind("1.2"),
        ),
    ),
    NamedFamily(
        "LongCat-Image",
        _comfyui(_KEY_NORM, "img_in.weight", lacks=(*_VECTOR, "txt_norm.weight", "double_stream_modulation_img.lin.weight"), txt_in__weight=(None, 3584)),
        _diffusers(_D_KEY_NORM, "single_transformer_blocks.0.proj_mlp.weight", "time_embed.timestep_embedder.linear_1.weight", context_embedder__weight=(None, 3584)),
        ffn=_FUSED,
    ),
    NamedFamily(
        "Ovis-Image",
        _comfyui(_KEY_NORM, "double_blocks.0.img_mlp.gate_proj.weight", "txt_norm.scale"),
        _diffusers(_D_KEY_NORM, "single_transformer_blocks.0.proj_mlp.weight", "context_embedder_norm.weight"),
        ffn=_FUSED,
    ),
    NamedFamily(
        "HunyuanImage 2.1",
        _comfyui(_REFINER, lacks=(*_VECTOR, "vision_in.proj.0.weight")),
        _diffusers(_D_REFINER, "time_guidance_embed.timestep_embedder.linear_1.weight"),
        variants=(_kind("refiner", img_in__proj__weight=(None, None, 1, 1, 1)), _kind("base or distilled", img_in__proj__weight=(None, None, 1, 1))),
        ffn=_FUSED,
    ),
    NamedFamily("HiDream-I1", _both("caption_projection.0.linear.weight", "double_stream_blocks.0.block.attn1.to_q.weight")),
    NamedFamily("HiDream-O1", _comfyui("t_embedder1.mlp.0.weight", "x_embedder.proj1.weight"), aside=frozenset({"visual"})),
    NamedFamily("OmniGen2", _comfyui("time_caption_embed.timestep_embedder.linear_1.bias", "ref_image_patch_embedder.weight", "layers.0.attn.to_q.weight")),
    NamedFamily("Boogu-Image", _comfyui("double_stream_layers.0.img_instruct_attn.processor.img_to_q.weight")),
    NamedFamily("Mage-Flow", _comfyui("transformer_blocks.0.attn.add_q_proj.weight", txt_norm__weight=(2560,), proj_out__weight=(128, None))),
    NamedFamily("JoyImage", _both("double_blocks.0.attn.img_attn_qkv.weight", "condition_embedder.time_embedder.linear_1.weight")),
    NamedFamily("Ideogram 4", _both("embed_image_indicator.weight", "llm_cond_proj.weight")),
    NamedFamily(
        "Krea 2",
        _comfyui("txtfusion.projector.weight", "blocks.0.attn.wq.weight"),
        _diffusers("text_fusion.projector.weight", "transformer_blocks.0.attn.to_q.weight"),
        aside=frozenset({"txtfusion", "text_fusion"}),
    ),
    NamedFamily("Lens", _comfyui("transformer_blocks.0.attn.norm_added_q.weight", "transformer_blocks.0.img_mlp.w1.weight")),
    NamedFamily("ERNIE-Image", _both("layers.0.mlp.linear_fc2.weight", "layers.0.self_attention.to_q.weight", "text_proj.weight")),
    NamedFamily(
        "Anima",
        _comfyui("blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight", "llm_adapter.blocks.0.cross_attn.q_proj.weight"),
        aside=frozenset({"llm_adapter"}),
    ),
    NamedFamily("Z-Image in pixels", _comfyui("cap_embedder.1.weight", "dec_net.cond_embed.weight")),
    NamedFamily(
        "PixelDiT",
        _comfyui("core.pixel_embedder.proj.weight", lacks=("lq_proj.latent_proj.0.weight",)),
        _comfyui("pixel_embedder.proj.weight", "s_embedder.proj.weight", lacks=("lq_proj.latent_proj.0.weight",)),
    ),
    NamedFamily("PiD", _comfyui("lq_proj.latent_proj.0.weight"), aside=frozenset({"lq_proj"})),
)  # fmt: skip

VIDEOS = (
    NamedFamily(
        "HunyuanVideo",
        *(_comfyui(_REFINER, vector) for vector in _VECTOR),
        _diffusers(_D_REFINER, "time_text_embed.text_embedder.linear_1.weight"),
        variants=(
            _kind("I2V", img_in__proj__weight=(None, 33, 1, 2, 2)),
            _kind("SkyReels I2V", img_in__proj__weight=(None, 32, 1, 2, 2)),
            _kind("T2V or I2V", img_in__proj__weight=(None, 16, 1, 2, 2)),
        ),
        ffn=_FUSED,
    ),
    NamedFamily(
        "HunyuanVideo 1.5",
        _comfyui(_REFINER, "vision_in.proj.0.weight"),
        _diffusers(_D_REFINER, "cond_type_embed.weight"),
        variants=(_kind("super-resolution", img_in__proj__weight=(None, 98, 1, 1, 1)), _kind("T2V or I2V", img_in__proj__weight=(None, 65, 1, 1, 1))),
        ffn=_FUSED,
    ),
    NamedFamily(
        "LTX-Video",
        _comfyui("adaln_single.emb.timestep_embedder.linear_1.bias", "patchify_proj.weight", lacks=("audio_adaln_single.linear.weight",)),
        _diffusers("time_embed.emb.timestep_embedder.linear_1.bias", "proj_in.weight", "transformer_blocks.0.attn2.norm_k.weight", lacks=("audio_proj_in.weight",)),
        variants=(
            *(_kind(kind, patchify_proj__weight=(width, None)) for kind, width in (("2B", 2048), ("13B", 4096))),
            *(_kind(kind, proj_in__weight=(width, None)) for kind, width in (("2B", 2048), ("13B", 4096))),
        ),
        unquantised=frozenset({_FIRST}),
    ),
    NamedFamily(
        "LTX-2",
        _comfyui("audio_adaln_single.linear.weight", "audio_patchify_proj.weight"),
        _diffusers("av_cross_attn_video_scale_shift.linear.weight", "audio_proj_in.weight"),
        unquantised=frozenset({_FIRST}),
    ),
    NamedFamily(
        "Mochi",
        _comfyui("t5_yproj.weight", "pos_frequencies"),
        _diffusers("time_embed.pooler.to_kv.weight", "pos_frequencies"),
        aside=frozenset({"t5_y_embedder"}),
    ),
    NamedFamily(
        "Cosmos",
        _comfyui("blocks.block0.blocks.0.block.attn.to_q.0.weight"),
        _diffusers("time_embed.t_embedder.linear_1.weight", "learnable_pos_embed.pos_emb_t"),
        variants=tuple(
            _kind(f"{size} {kind}", x_embedder__proj__1__weight=(width, columns))
            for size, width in (("7B", 4096), ("14B", 5120))
            for kind, columns in (("Text2World", 68), ("Video2World", 72))
        ),
        ffn=frozenset({"layer1", "layer2"}),
    ),
    NamedFamily(
        "Cosmos Predict2",
        _comfyui("blocks.0.mlp.layer1.weight", "x_embedder.proj.1.weight", lacks=("llm_adapter.blocks.0.cross_attn.q_proj.weight",)),
        _diffusers("time_embed.t_embedder.linear_1.weight", "norm_out.linear_1.weight", lacks=("learnable_pos_embed.pos_emb_t",)),
        variants=tuple(
            _kind(f"{size} {kind}", x_embedder__proj__1__weight=(width, columns))
            for size, width in (("2B", 2048), ("14B", 5120))
            for kind, columns in (("Text2Image", 68), ("Video2World", 72))
        ),
    ),
    NamedFamily(
        "CogVideoX",
        _comfyui("blocks.0.norm1.linear.weight", "patch_embed.text_proj.weight", "time_embedding_linear_1.weight"),
        _diffusers("transformer_blocks.0.norm1.linear.weight", "patch_embed.text_proj.weight", "time_embedding.linear_1.weight"),
        attention=frozenset({"q", "k", "v", "attn_out"}),
        ffn=frozenset({"ff_proj", "ff_out"}),
    ),
    NamedFamily(
        "Kandinsky 5",
        _both("visual_transformer_blocks.0.cross_attention.key_norm.weight", "text_embeddings.in_layer.weight", "visual_embeddings.in_layer.weight"),
        variants=(
            _kind("Image Lite", visual_embeddings__in_layer__weight=(2560, 64)),
            _kind("Video Lite", visual_embeddings__in_layer__weight=(1792, None)),
            _kind("Video Pro", visual_embeddings__in_layer__weight=(4096, None)),
        ),
    ),
    NamedFamily(
        "MiniMax H3",
        _comfyui("video_patch_proj.weight", "audio_patch_proj.weight"),
        _diffusers("audio_proj_in.weight", "token_refiner.refiner_blocks.0.norm1.weight"),
    ),
    NamedFamily(
        "SeedVR2",
        _comfyui("vid_in.proj.weight", "emb_in.proj_in.weight", "blocks.0.attn.proj_qkv.vid.weight"),
        _comfyui("vid_in.proj.weight", "emb_in.proj_in.weight", "blocks.0.attn.proj_qkv.all.weight"),
        variants=(_kind("3B", vid_in__proj__weight=(2560, None)), _kind("7B", vid_in__proj__weight=(3072, None))),
    ),
)  # fmt: skip

OTHERS = (
    NamedFamily(
        "ACE-Step",
        _comfyui("genre_embedder.weight", "lyric_proj.weight"),
        aside=frozenset({"lyric_encoder", "projectors"}),
    ),
    NamedFamily(
        "ACE-Step 1.5",
        _comfyui("encoder.lyric_encoder.layers.0.input_layernorm.weight", "decoder.layers.0.self_attn.q_proj.weight"),
        _diffusers("time_embed_r.linear_1.weight", "proj_in_conv.weight", "condition_embedder.weight"),
        aside=frozenset({"encoder", "tokenizer", "detokenizer"}),
    ),
    NamedFamily(
        "Hunyuan3D 2",
        _comfyui("latent_in.weight", "cond_in.weight", "double_blocks.0.img_attn.qkv.weight"),
        ffn=_FUSED,
    ),
    NamedFamily(
        "Hunyuan3D 2.1", _comfyui("t_embedder.mlp.2.weight", "blocks.0.attn1.k_norm.weight", "x_embedder.weight")
    ),
    NamedFamily("TripoSplat", _comfyui("cam_out_layer.weight", "repo_layers.0.final_map.weight")),
)

NAMED: tuple[NamedFamily, ...] = (*IMAGES, *STABLE_DIFFUSION, *VIDEOS, *OTHERS)
"""Every family that has a name and no table. No file is of two."""
