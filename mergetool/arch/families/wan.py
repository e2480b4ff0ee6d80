"""Wan 2.1 and 2.2 (T2V, I2V, TI2V, VACE and models built on them), two layouts.

Their blocks have self-attention, cross-attention and feed-forward.

Canonical names are those of diffusers' ``WanTransformer3DModel``. Nothing is fused in either layout, but ``norm2`` here is ``norm3`` there: of a block's three
norms only the one before cross-attention has parameters, which diffusers counts in the order of the forward pass. Patches are embedded by a convolution over
time and space, whose weight has five dimensions. Of 2.2's A14B models a checkpoint is one of two, for high or for low noise; no tensor's name or shape says which.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import InputEmbedder, Preset
from mergetool.arch.known import KnownFamily, Like, Signature, Variant
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named

HEAD = 128
"""Rows of an attention head, which no shape shows."""


def _attention(name: str, comfyui: str, *image: Named) -> Named:
    inside = (
        Named("to_q", "q", ("q",), shape=("dim", "dim"), bias=True),
        Named("to_k", "k", ("k",), shape=("dim", "dim"), bias=True),
        Named("to_v", "v", ("v",), shape=("dim", "dim"), bias=True),
        Named("to_out.0", "o", ("out",), shape=("dim", "dim"), bias=True),
        Named("norm_q", groups=("norm",), shape=("dim",)),
        Named("norm_k", groups=("norm",), shape=("dim",)),
        *image,
    )
    return Named(name, comfyui, ("attention", comfyui), inside)


_IMAGE = (
    Named("add_k_proj", "k_img", ("k", "image"), shape=("added", "dim"), bias=True),
    Named("add_v_proj", "v_img", ("v", "image"), shape=("added", "dim"), bias=True),
    Named("norm_added_k", "norm_k_img", ("norm", "image"), shape=("added",)),
)


def _block(*image: Named) -> tuple[Named, ...]:
    return (
        Named("scale_shift_table", "modulation", ("modulation",), shape=(1, 6, "dim"), tensor=True),
        _attention("attn1", "self_attn"),
        Named("norm2", "norm3", ("norm",), shape=("dim",), bias=True),
        _attention("attn2", "cross_attn", *image),
        Named("ffn.net.0.proj", "ffn.0", ("ffn",), shape=("hidden", "dim"), bias=True),
        Named("ffn.net.2", "ffn.2", ("ffn",), shape=("dim", "hidden"), bias=True),
    )


_TIME, _TEXT, _PICTURE = (f"condition_embedder.{name}" for name in ("time_embedder", "text_embedder", "image_embedder"))
_PATCHES, _IMAGE_NORM = "patch_embedding.weight", f"{_PICTURE}.norm1.weight"


def _patches(rows: int | None, columns: int) -> Mapping[str, Like]:
    return {_PATCHES: (rows, columns, 1, 2, 2)}


_T2V, _I2V = "T2V 14B: 2.1, or 2.2's for high or low noise", "2.2 I2V A14B, high or low noise"
_NOISE: Mapping[str, tuple[str, ...]] = {  # diffusers' pipelines have the one for high noise in transformer
    "high": ("high-?noise", r"\bhigh\b", r"\bhn\b", "2[.]2.*/transformer(/|$)"),
    "low": ("low-?noise", r"\blow\b", r"\bln\b", "/transformer-2(/|$)"),
}


class Wan(KnownFamily):
    """Wan of any width and depth.

    Groups overlap. ``blocks`` are the main ones, ``vace`` VACE's own with what embeds its input; the others run over both.

    - ``attention``: projections, outputs and norms of q and k; ``self_attn`` and ``cross_attn``: one of the two. ``q``, ``k``, ``v``, ``out``: projections.
    - ``image``: what I2V of 2.1 adds: the embedder of the first picture, and its keys and values in every cross-attention.
    - ``modulation``: the tables of blocks and of the last layer. ``norm``: every norm with parameters.
    - ``embedder``: of patches, time, text and pictures. ``final``: the last layer with its table.
    """

    name = "Wan"
    names = (
        Named("patch_embedding", groups=("embedder",), shape=("dim", "input", 1, 2, 2), bias=True),
        Named(f"{_TEXT}.linear_1", "text_embedding.0", ("embedder",), shape=("dim", "text"), bias=True),
        Named(f"{_TEXT}.linear_2", "text_embedding.2", ("embedder",), shape=("dim", "dim"), bias=True),
        Named(f"{_TIME}.linear_1", "time_embedding.0", ("embedder",), shape=("dim", "frequencies"), bias=True),
        Named(f"{_TIME}.linear_2", "time_embedding.2", ("embedder",), shape=("dim", "dim"), bias=True),
        Named("condition_embedder.time_proj", "time_projection.1", ("embedder",), shape=("6*dim", "dim"), bias=True),
        Named(_PICTURE, "img_emb", ("embedder", "image"), (
            Named("pos_embed", "emb_pos", shape=(1, "tokens", "image"), tensor=True),
            Named("norm1", "proj.0", ("norm",), shape=("image",), bias=True),
            Named("ff.net.0.proj", "proj.1", shape=("image", "image"), bias=True),
            Named("ff.net.2", "proj.3", shape=("pictured", "image"), bias=True),
            Named("norm2", "proj.4", ("norm",), shape=("pictured",), bias=True),
        )),
        Named("vace_patch_embedding", groups=("vace", "embedder"), shape=("vace", "vace_input", 1, 2, 2), bias=True),
        Named("vace_blocks.0.proj_in", "vace_blocks.0.before_proj", ("vace",), shape=("vace", "dim"), bias=True),
        Named("vace_blocks.{i}", groups=("vace",), inside=(
            *_block(), Named("proj_out", "after_proj", shape=("vace", "dim"), bias=True),
        )),
        Named("blocks.{i}", groups=("blocks",), inside=_block(*_IMAGE)),
        Named("scale_shift_table", "head.modulation", ("final", "modulation"), shape=(1, 2, "dim"), tensor=True),
        Named("proj_out", "head.head", ("final",), shape=("output", "dim"), bias=True),
    )  # fmt: skip
    signatures = (
        Signature(
            "comfyui",
            has={
                "head.modulation": (1, 2, None),
                "blocks.0.modulation": (1, 6, None),
                "blocks.0.self_attn.q.weight": None,
                _PATCHES: (None,) * 5,
            },
        ),
        Signature(
            "diffusers",
            has={
                "scale_shift_table": (1, 2, None),
                "blocks.0.scale_shift_table": (1, 6, None),
                "blocks.0.attn1.to_q.weight": None,
                "condition_embedder.time_proj.weight": None,
                _PATCHES: (None,) * 5,
            },
        ),
    )
    variants = (
        Variant("VACE 14B", {"vace_patch_embedding.weight": (5120, None, 1, 2, 2)}),
        Variant("VACE 1.3B", {"vace_patch_embedding.weight": (1536, None, 1, 2, 2)}),
        Variant("VACE", {"vace_patch_embedding.weight": None}),
        Variant("2.1 Fun Camera", {"control_adapter.conv.weight": None, _IMAGE_NORM: None}),
        Variant("2.2 Fun Camera", {"control_adapter.conv.weight": None}),
        Variant("2.2 S2V", {"casual_audio_encoder.encoder.final_linear.weight": None}),
        Variant("HuMo", {"audio_proj.audio_proj_glob_1.layer.bias": None}),
        Variant("2.2 Animate", {"face_adapter.fuser_blocks.0.k_norm.weight": None}),
        Variant("2.2 Animate", {"face_adapter.0.norm_k.weight": None}),
        Variant("SCAIL", {"patch_embedding_pose.weight": None}),
        Variant("Dancer", {"patch_embedding_global.weight": None}),
        Variant("SkyReels 2, diffusion forcing", {"fps_embedding.weight": None}),
        Variant("Fun Control", _patches(None, 48), {_PATCHES: (3072, 48, 1, 2, 2)}),
        Variant("Fun Control", _patches(None, 52)),
        Variant("2.1 FLF2V 14B", {f"{_PICTURE}.pos_embed": None, **_patches(5120, 36)}),
        Variant("2.1 I2V 14B", {_IMAGE_NORM: None, **_patches(5120, 36)}),
        Variant("2.1 Fun InP 1.3B", {_IMAGE_NORM: None, **_patches(1536, 36)}),
        Variant(_I2V, _patches(5120, 36)),
        Variant(_T2V, _patches(5120, 16)),
        Variant("2.1 T2V 1.3B", _patches(1536, 16)),
        Variant("2.2 TI2V 5B", _patches(3072, 48)),
    )
    stock = (
        *(
            Stock(f"2.2 {kind} A14B, {noise} noise", (variant,), words)
            for noise, words in _NOISE.items() for kind, variant in (("T2V", _T2V), ("I2V", _I2V))
        ),
        Stock("2.1 T2V 14B", (_T2V,), (r"2\.?1",)),
        *(Stock(name, (name,)) for name in ("2.1 I2V 14B", "2.1 T2V 1.3B", "2.2 TI2V 5B")),
        *(Stock(f"VACE {size}", (f"VACE {size}",), of=(f"2.1 T2V {size}",)) for size in ("14B", "1.3B")),
    )  # fmt: skip
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {  # vectors and convolutions are never quantised
        "dim": ("patch_embedding.bias", 0),
        "input": (_PATCHES, 1),
        "output": ("proj_out.bias", 0),
        "hidden": ("blocks.0.ffn.net.0.proj.bias", 0),
        "text": (f"{_TEXT}.linear_1.weight", 1),
        "frequencies": (f"{_TIME}.linear_1.weight", 1),
        "added": ("blocks.0.attn2.add_k_proj.bias", 0),
        "image": (_IMAGE_NORM, 0),
        "pictured": (f"{_PICTURE}.norm2.weight", 0),
        "tokens": (f"{_PICTURE}.pos_embed", 1),
        "vace": ("vace_patch_embedding.bias", 0),
        "vace_input": ("vace_patch_embedding.weight", 1),
    }
    input_embedder = InputEmbedder(_PATCHES, "proj_out.weight", 4)
    optional = frozenset({"added", "image", "pictured", "tokens", "vace", "vace_input"})
    group_order = (
        *("blocks", "vace", "attention", "self_attn", "cross_attn"),
        *("q", "k", "v", "out", "ffn", "image", "modulation", "norm", "embedder", "final"),
    )
    precise = frozenset({"modulation", "norm", "embedder", "final"})
    quantised_layout = "comfyui"  # ComfyUI knows none of diffusers' names
    lora_layout = "comfyui"  # which diffusers renames where they have no alpha outside the blocks
    lora_alphas = False
    sign_of_fun = "lora_unet__blocks_0_cross_attn_k.lora_down.weight"
    sampling = (
        SamplingDefaults("Wan", 50, "cfg", 5.0, unit=32, side=704, name="2.2 TI2V", signs={"in_channels": 48}),
        SamplingDefaults("Wan", 50, "cfg", 5.0, side=640),
    )
    loader = "WanLoraLoaderMixin"
    # ``*`` is every tensor, embedders and the last layer included; a later setting wins.
    presets = (
        Preset("blocks-only", ("*=0", "blocks=1")),
        Preset("attention-only", ("*=0", "attention=1")),
        Preset("ffn-only", ("*=0", "ffn=1")),
        Preset("early-blocks", ("*=0", "blocks=linear(1,0)")),
        Preset("late-blocks", ("*=0", "blocks=linear(0,1)")),
    )

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`.

        None where the width is not of whole heads, or for a model with modules of which diffusers has another class.
        """
        if sizes["dim"] % HEAD or any(self.table.find(name) is None for name in parts):
            return None
        config = {
            "_class_name": "WanTransformer3DModel",
            "added_kv_proj_dim": sizes.get("added"),
            "attention_head_dim": HEAD,
            "cross_attn_norm": True,
            "ffn_dim": sizes["hidden"],
            "freq_dim": sizes["frequencies"],
            "image_dim": sizes.get("image"),
            "in_channels": sizes["input"],
            "num_attention_heads": sizes["dim"] // HEAD,
            "num_layers": sizes["blocks"],
            "out_channels": sizes["output"] // 4,
            "patch_size": [1, 2, 2],
            "pos_embed_seq_len": sizes.get("tokens"),
            "qk_norm": "rms_norm_across_heads",
            "text_dim": sizes["text"],
        }
        if "vace" in sizes and sizes["vace_blocks"]:
            config |= {
                "_class_name": "WanVACETransformer3DModel",
                "vace_in_channels": sizes["vace_input"],
                # which blocks they stand beside is in no shape: every so many, as in the published models and in ComfyUI
                "vace_layers": list(range(0, sizes["blocks"], sizes["blocks"] // sizes["vace_blocks"])),
            }
        return config


WAN = Wan()

T2V_14B: Mapping[str, int] = {
    "dim": 5120, "hidden": 13824, "input": 16, "output": 64, "text": 4096, "frequencies": 256, "blocks": 40,
}  # fmt: skip
"""The sizes of 2.1's T2V 14B, and of either transformer of 2.2's T2V A14B."""
