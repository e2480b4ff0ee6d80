"""Flux.1 (dev, schnell, Fill, Kontext, Krea): two layouts, one set of parts.

Double blocks have two streams, single blocks one.

Canonical names are those of diffusers' ``FluxTransformer2DModel``. Black Forest Labs' own layout, which ComfyUI has, stores q, k and v as one tensor, in single
blocks with the feed-forward behind them, and the final modulation as (shift, scale) where diffusers has (scale, shift).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import InputEmbedder, Lookalike
from mergetool.arch.families.flux_like import CONTROLNET, FluxLike
from mergetool.arch.known import Signature, Variant
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named

DOUBLE = (
    Named("norm1.linear", "img_mod.lin", ("img", "modulation"), shape=("6*dim", "dim"), bias=True),
    Named("norm1_context.linear", "txt_mod.lin", ("txt", "modulation"), shape=("6*dim", "dim"), bias=True),
    Named("attn.to_q", "img_attn.qkv[0]", ("img", "attention", "q"), shape=("dim", "dim"), bias=True),
    Named("attn.to_k", "img_attn.qkv[1]", ("img", "attention", "k"), shape=("dim", "dim"), bias=True),
    Named("attn.to_v", "img_attn.qkv[2]", ("img", "attention", "v"), shape=("dim", "dim"), bias=True),
    Named("attn.add_q_proj", "txt_attn.qkv[0]", ("txt", "attention", "q"), shape=("dim", "dim"), bias=True),
    Named("attn.add_k_proj", "txt_attn.qkv[1]", ("txt", "attention", "k"), shape=("dim", "dim"), bias=True),
    Named("attn.add_v_proj", "txt_attn.qkv[2]", ("txt", "attention", "v"), shape=("dim", "dim"), bias=True),
    Named("attn.norm_q.weight", "img_attn.norm.query_norm.scale", ("img", "attention", "norm"), shape=("head",)),
    Named("attn.norm_k.weight", "img_attn.norm.key_norm.scale", ("img", "attention", "norm"), shape=("head",)),
    Named("attn.norm_added_q.weight", "txt_attn.norm.query_norm.scale", ("txt", "attention", "norm"), shape=("head",)),
    Named("attn.norm_added_k.weight", "txt_attn.norm.key_norm.scale", ("txt", "attention", "norm"), shape=("head",)),
    Named("attn.to_out.0", "img_attn.proj", ("img", "attention", "out"), shape=("dim", "dim"), bias=True),
    Named("attn.to_add_out", "txt_attn.proj", ("txt", "attention", "out"), shape=("dim", "dim"), bias=True),
    Named("ff.net.0.proj", "img_mlp.0", ("img", "ffn"), shape=("hidden", "dim"), bias=True),
    Named("ff.net.2", "img_mlp.2", ("img", "ffn"), shape=("dim", "hidden"), bias=True),
    Named("ff_context.net.0.proj", "txt_mlp.0", ("txt", "ffn"), shape=("hidden", "dim"), bias=True),
    Named("ff_context.net.2", "txt_mlp.2", ("txt", "ffn"), shape=("dim", "hidden"), bias=True),
)
SINGLE = (
    Named("norm.linear", "modulation.lin", ("modulation",), shape=("3*dim", "dim"), bias=True),
    Named("attn.to_q", "linear1[0]", ("attention", "q"), shape=("dim", "dim"), bias=True, rows="="),
    Named("attn.to_k", "linear1[1]", ("attention", "k"), shape=("dim", "dim"), bias=True, rows="="),
    Named("attn.to_v", "linear1[2]", ("attention", "v"), shape=("dim", "dim"), bias=True, rows="="),
    Named("proj_mlp", "linear1[3]", ("ffn",), shape=("hidden", "dim"), bias=True, rows="4*="),
    Named("attn.norm_q.weight", "norm.query_norm.scale", ("attention", "norm"), shape=("head",)),
    Named("attn.norm_k.weight", "norm.key_norm.scale", ("attention", "norm"), shape=("head",)),
    Named("proj_out", "linear2", ("attention", "out", "ffn"), shape=("dim", "both"), bias=True),
)
_EMBEDDERS: Mapping[str, str] = {
    "timestep_embedder": "time_in",
    "text_embedder": "vector_in",
    "guidance_embedder": "guidance_in",
}
_INNER: Mapping[str, tuple[str, str | int]] = {
    "timestep_embedder": ("dim", 256),
    "text_embedder": ("dim", "pooled"),
    "guidance_embedder": ("guidance", 256),
}
_NOT_FLUX: Mapping[str, None] = {
    **CONTROLNET,
    "double_blocks.0.img_mlp.gate_proj.weight": None,  # Ovis; LongCat, Flux.2 and Chroma have no vector_in
}

_GUIDED = "dev, Kontext or Krea"


class Flux(FluxLike):
    """Flux.1 of any width and depth.

    Groups overlap. ``double`` and ``single`` are the blocks, ``img`` and ``txt`` the two streams of the double ones with what embeds their tokens;
    ``attention``, ``q``, ``k``, ``v``, ``out``, ``ffn``, ``modulation`` and ``norm`` run over both kinds.

    - ``attention``: projections, outputs and norms of q and k. ``out`` and ``ffn``, both, hold a single block's ``proj_out``, whose columns are those
      of its attention and then of its feed-forward.
    - ``modulation``: that of the blocks and of the final layer. ``norm``: the norms of q and k, which are all there are.
    - ``embedder``: of image and text tokens, time, pooled text and guidance. ``final``: the final layer and its modulation.
    """

    name = "Flux.1"
    encoders = ("clip_l", "t5xxl")
    model = "FluxTransformer2DModel"
    names = (
        Named("x_embedder", "img_in", ("img", "embedder"), shape=("dim", "patch_in"), bias=True),
        Named("context_embedder", "txt_in", ("txt", "embedder"), shape=("dim", "context"), bias=True),
        *(
            Named(f"time_text_embed.{theirs}.linear_{n}", f"{ours}.{way}_layer", ("embedder",), bias=True,
                  shape=_INNER[theirs] if n == 1 else (_INNER[theirs][0], _INNER[theirs][0]))
            for theirs, ours in _EMBEDDERS.items() for n, way in ((1, "in"), (2, "out"))
        ),
        Named("transformer_blocks.{i}", "double_blocks.{i}", ("double",), inside=DOUBLE),
        Named("single_transformer_blocks.{i}", "single_blocks.{i}", ("single",), inside=SINGLE),
        Named("norm_out.linear.scale", "final_layer.adaLN_modulation.1[1]", ("final", "modulation"), diffusers="norm_out.linear[0]",
              shape=("dim", "dim"), bias=True),
        Named("norm_out.linear.shift", "final_layer.adaLN_modulation.1[0]", ("final", "modulation"), diffusers="norm_out.linear[1]",
              shape=("dim", "dim"), bias=True),
        Named("proj_out", "final_layer.linear", ("final",), shape=("patch_out", "dim"), bias=True),
    )  # fmt: skip
    signatures = (
        Signature(
            "comfyui",
            has=dict.fromkeys(
                ("double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight", "vector_in.in_layer.weight")
            ),
            lacks=_NOT_FLUX,
        ),
        Signature(
            "diffusers",
            has=dict.fromkeys(
                (
                    *("transformer_blocks.0.attn.norm_added_k.weight", "single_transformer_blocks.0.proj_mlp.weight"),
                    *("x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"),
                )
            ),
            lacks=_NOT_FLUX,
        ),
    )
    sampling = (
        SamplingDefaults(
            "Flux", 4, "none", name="schnell", signs={"guidance_embeds": False}, source="the model's card"
        ),
        SamplingDefaults("Flux", 28, "distilled", 3.5),
    )
    variants = (
        Variant("Fill", has={"x_embedder.weight": (None, 384)}, fp16="avoided"),
        Variant("Canny or Depth", has={"x_embedder.weight": (None, 128)}),
        Variant(_GUIDED, has={"time_text_embed.guidance_embedder.linear_1.weight": None}),
        Variant("schnell", lacks={"time_text_embed.guidance_embedder.linear_1.weight": None}),
    )
    stock = (
        *(
            Stock(name, (name,), (word,), of=("dev",))
            for name, word in (("Fill", "fill"), ("Canny or Depth", "canny|depth"))
        ),
        Stock("Kontext", (_GUIDED,), ("kontext",), of=("dev",)),
        Stock("Krea", (_GUIDED,), ("krea",)),
        Stock("dev", (_GUIDED,), (r"\bdev\b", r"flux-?1?-?d\b"), distilled=True),
        Stock("schnell", ("schnell",), ("schnell", r"flux-?1?-?s\b"), distilled=True),
    )
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        "dim": ("x_embedder.bias", 0),
        "head": ("transformer_blocks.0.attn.norm_q.weight", 0),
        "hidden": ("transformer_blocks.0.ff.net.0.proj.bias", 0),
        "patch_in": ("x_embedder.weight", 1),
        "patch_out": ("proj_out.bias", 0),
        "context": ("context_embedder.weight", 1),
        "pooled": ("time_text_embed.text_embedder.linear_1.weight", 1),
        "guidance": ("time_text_embed.guidance_embedder.linear_1.bias", 0),
    }
    controls = (
        ("ControlNet (xlabs)", ("controlnet_blocks.0.weight", "double_blocks.0.img_attn.norm.key_norm.scale")),
        ("ControlNet (MistoLine)", ("controlnet_blocks.0.linear.weight",)),
        *(
            (
                f"ControlNet{kind}",
                ("controlnet_x_embedder.weight", "time_text_embed.text_embedder.linear_1.weight", *mode),
            )
            for kind, mode in ((" union", ("controlnet_mode_embedder.weight",)), ("", ()))
        ),
    )
    input_embedder = InputEmbedder("x_embedder.weight", "proj_out.weight")
    optional = frozenset({"guidance"})
    precise = frozenset({"norm", "embedder", "final"})
    widened: ClassVar[Mapping[str, int]] = {"x_embedder.weight": 128}  # of a picture and its control
    sign_of_control = "single_blocks.0.norm.key_norm.scale"
    # the other names of double blocks are also those of Qwen-Image's and SD3's blocks in diffusers
    lora_signs = ("double_blocks", "single_blocks", "single_transformer_blocks")
    lookalike = Lookalike(
        name="Flux.2",
        widths=frozenset({4096, 6144}),
        own=3072,
        reading=("linear1", "img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "txt_mlp.0"),
        fused="linear1",
        ratio=7,
        word="flux.2",
        own_words=("flux-1", "flux.1", "flux1"),
    )

    def own_config(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """See `FluxLike.own_config`."""
        return {"guidance_embeds": "guidance" in sizes, "pooled_projection_dim": sizes["pooled"]}


FLUX = Flux()

DEV: Mapping[str, int] = FLUX.derived(
    {"dim": 3072, "head": 128, "hidden": 12288, "patch_in": 64, "patch_out": 64, "context": 4096, "pooled": 768, "guidance": 3072,
     "transformer_blocks": 19, "single_transformer_blocks": 38}
)  # fmt: skip
"""The sizes of dev, Kontext and Krea; schnell has no guidance, Fill 384 columns of patches."""
