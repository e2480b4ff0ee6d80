"""Z-Image (Base, Turbo, De-Turbo, Omni): one transformer, two layouts, one set of parts.

Canonical names are those of diffusers' ``ZImageTransformer2DModel``. The ComfyUI layout (that of Lumina2) stores
q, k and v of a block as one ``attention.qkv.weight``, rows in that order, and calls some modules otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import Anatomy, Lookalike, Preset
from mergetool.arch.known import KnownFamily
from mergetool.arch.signs import Signature, Stock, Variant
from mergetool.arch.table import Named

_BLOCK = (
    # k and v may have fewer heads than q, which has as many rows as the output projection has columns.
    Named(
        "attention.to_q",
        "attention.qkv[0]",
        ("attention", "q"),
        shape=("dim", "dim"),
        rows="attention.to_out.0",
        heads="attention.norm_q",
    ),
    Named("attention.to_k", "attention.qkv[1]", ("attention", "k"), shape=("dim", "dim"), heads="attention.norm_k"),
    Named("attention.to_v", "attention.qkv[2]", ("attention", "v"), shape=("dim", "dim"), heads="attention.norm_k"),
    Named("attention.to_out.0", "attention.out", ("attention", "out"), shape=("dim", "dim")),
    Named("attention.norm_q", "attention.q_norm", ("attention", "norm"), shape=("head",)),
    Named("attention.norm_k", "attention.k_norm", ("attention", "norm"), shape=("head",)),
    Named("feed_forward.w1", groups=("ffn",), shape=("hidden", "dim")),
    Named("feed_forward.w2", groups=("ffn",), shape=("dim", "hidden")),
    Named("feed_forward.w3", groups=("ffn",), shape=("hidden", "dim")),
    Named("attention_norm1", groups=("norm",), shape=("dim",)),
    Named("ffn_norm1", groups=("norm",), shape=("dim",)),
    Named("attention_norm2", groups=("norm",), shape=("dim",)),
    Named("ffn_norm2", groups=("norm",), shape=("dim",)),
)
_MODULATED = (*_BLOCK, Named("adaLN_modulation.0", groups=("adaln",), shape=("4*dim", "modulation"), bias=True))


class ZImage(KnownFamily):
    """Z-Image of any width and depth, Omni included.

    Groups overlap. ``layers`` means the main layers only; ``attention``, ``q``, ``k``, ``v``, ``out``,
    ``ffn``, ``adaln`` and ``norm`` run over every block, those of the refiners included.

    - ``refiner``: ``noise_refiner`` and ``context_refiner`` together; Omni's siglip_refiner is not in it.
    - ``siglip``: everything Omni adds (siglip_embedder, siglip_refiner, siglip_pad_token).
    - ``attention``: the whole attention module. ``q``, ``k``, ``v``, ``out`` are its projections only: the q and
      k norms are in ``attention`` and ``norm``, not in ``q`` or ``k``.
    - ``adaln``: the blocks' modulations and the final layer's.
    - ``norm``: every RMSNorm weight, so also ``cap_embedder.0.weight``, which is one in spite of its name.
    - ``embedder``: x_embedder, t_embedder, cap_embedder. ``pad``: the pad tokens.
    - ``final``: the final layer, and the unused ``norm_final.weight`` some ComfyUI files carry.
    """

    name = "Z-Image"
    # 256 and 1024 are constants of the model's code; "2-1" is patch size 2, frame patch 1
    names = (
        Named("all_x_embedder.2-1", "x_embedder", ("embedder",), shape=("dim", "patch"), bias=True),
        Named("t_embedder.mlp.0", groups=("embedder",), shape=(1024, 256), bias=True),
        Named("t_embedder.mlp.2", groups=("embedder",), shape=("modulation", 1024), bias=True),
        Named("cap_embedder.0", groups=("embedder", "norm"), shape=("caption",)),
        Named("cap_embedder.1", groups=("embedder",), shape=("dim", "caption"), bias=True),
        Named("siglip_embedder.0", groups=("siglip", "norm"), shape=("siglip",)),
        Named("siglip_embedder.1", groups=("siglip",), shape=("dim", "siglip"), bias=True),
        Named("x_pad_token", groups=("pad",), shape=(1, "dim"), tensor=True),
        Named("cap_pad_token", groups=("pad",), shape=(1, "dim"), tensor=True),
        Named("siglip_pad_token", groups=("siglip", "pad"), shape=("siglip_tokens", "dim"), tensor=True),
        Named("noise_refiner.{i}", groups=("refiner", "noise_refiner"), inside=_MODULATED),
        Named("context_refiner.{i}", groups=("refiner", "context_refiner"), inside=_BLOCK),
        Named("siglip_refiner.{i}", groups=("siglip",), inside=_BLOCK),
        Named("layers.{i}", groups=("layers",), inside=_MODULATED),
        Named("norm_final", groups=("final", "norm")),
        Named("all_final_layer.2-1", "final_layer", ("final",), inside=(
            Named("adaLN_modulation.1", groups=("adaln",), shape=("dim", "modulation"), bias=True),
            Named("linear", shape=("patch", "dim"), bias=True),
        )),
    )  # fmt: skip
    # Lumina 2 has the same names: its caption embedder has 2304 rows, and its modulation is adaLN_modulation.1. The pixel-space kind has a decoder.
    signatures = tuple(
        Signature(
            layout,
            has={"cap_embedder.1.weight": None, f"noise_refiner.0.attention.{norm}.weight": None},
            lacks={
                "cap_embedder.1.weight": (2304, None),
                "noise_refiner.0.adaLN_modulation.1.weight": None,
                "dec_net.cond_embed.weight": None,
            },
        )
        for layout, norm in (("comfyui", "k_norm"), ("diffusers", "norm_k"))
    )
    variants = (Variant("Omni", {"siglip_embedder.0.weight": None}),)
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {  # vectors are never quantised
        "dim": ("noise_refiner.0.attention_norm1.weight", 0),
        "head": ("noise_refiner.0.attention.norm_k.weight", 0),
        "caption": ("cap_embedder.0.weight", 0),
        "patch": ("all_final_layer.2-1.linear.bias", 0),
        "siglip": ("siglip_embedder.0.weight", 0),
    }
    optional = frozenset({"siglip"})
    group_order = (
        *("refiner", "noise_refiner", "context_refiner", "layers"),
        *("attention", "q", "k", "v", "out", "ffn", "adaln", "norm"),
        *("embedder", "pad", "siglip", "final"),
    )
    unused = frozenset({"norm_final.weight"})
    main, kept = "layers", "refiner"
    precise = frozenset({"refiner", "siglip", "norm", "adaln", "embedder", "pad", "final"})
    quantised_layout = "comfyui"  # ComfyUI does not join the scales of q, k and v
    # ``*`` is every tensor, embedders, pad tokens and final layer included; a later setting wins.
    presets = (
        Preset("refiners-kept", ("refiner=0",)),
        Preset("layers-only", ("*=0", "layers=1")),
        Preset("attention-only", ("*=0", "layers.attention=1")),
        Preset("ffn-only", ("*=0", "layers.ffn=1")),
        Preset("early-layers", ("*=0", "layers=linear(1,0)")),
        Preset("late-layers", ("*=0", "layers=linear(0,1)")),
    )
    fp16 = "witnessed"
    stock = (
        Stock("De-Turbo", words=("de-?turbo",), of=("Turbo",)),
        Stock("Turbo", words=("turbo",), of=("Base",), distilled=True),
        Stock("Base", words=(r"\bbase\b", "z-image(/|$)")),
    )
    gains_grow = True
    loader = "ZImageLoraLoaderMixin"
    in_comfyui = frozenset({"diffusion_model.", "transformer.", "lycoris_", ""})
    flat_layout = "diffusers"
    transformer = "ZImageTransformer2DModel"
    lookalike = Lookalike(
        name="Lumina-Image 2",
        widths=frozenset({2304}),
        own=3840,
        reading=("attention.qkv", "attention.to_q", "feed_forward.w1", "feed_forward.w3"),
        fused="attention.qkv",
        ratio=3,
        word="lumina",
        own_words=("z-image", "z_image", "zimage"),
    )
    controls = (("ControlNet", ("control_layers",)), ("ControlNet", ("control_all_x_embedder",)))

    def derived(self, sizes: dict[str, int]) -> dict[str, int]:
        """The width of the time embedding, that of the feed-forward, and Omni's token."""
        dim = sizes["dim"]
        tokens = {"siglip_tokens": 1} if "siglip" in sizes else {}
        return {"modulation": min(dim, 256), "hidden": int(dim / 3 * 8), **tokens, **sizes}

    def fp16_witness(self, anatomy: Anatomy) -> str | None:
        """The norm of the last layer but one."""
        depth = sum(name.startswith("layers.") and name.endswith(".ffn_norm1.weight") for name in anatomy.parts)
        name = f"layers.{depth - 2}.ffn_norm1.weight"
        return name if name in anatomy.parts else None

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`.

        None for heads of a width that no known model has: the shapes do not show how it divides between the rotary axes.
        """
        if sizes["head"] not in AXES or "all_x_embedder.2-1.weight" not in parts:
            return None
        dim, head = sizes["dim"], sizes["head"]
        return {
            "_class_name": self.transformer,
            **REFERENCE_CONFIG,
            "axes_dims": list(AXES[head]),
            "in_channels": sizes["patch"] // 4,
            "dim": dim,
            "n_layers": sizes["layers"],
            "n_refiner_layers": sizes["noise_refiner"],
            "n_heads": dim // head,
            "n_kv_heads": dim // head,
            "cap_feat_dim": sizes["caption"],
            "siglip_feat_dim": sizes.get("siglip"),
        }


Z_IMAGE = ZImage()

AXES: Mapping[int, tuple[int, int, int]] = {128: (32, 48, 48), 32: (8, 12, 12)}
"""Head width -> how it divides between the rotary axes: of the real model, and of the embedded ones."""

# transformer/config.json of Z-Image, Z-Image-Turbo and their fine-tunes; Omni has siglip_feat_dim 1152.
REFERENCE_CONFIG: Mapping[str, Any] = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "n_kv_heads": 30,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "siglip_feat_dim": None,
}


def reference_shapes(config: Mapping[str, Any], layout: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Z-Image transformer with its shape, in canonical order, without prefix.

    ``config`` is a transformer's config.json; keys it lacks are taken from ``REFERENCE_CONFIG``. Shapes follow
    diffusers' ``ZImageTransformer2DModel``, which gives k and v as many heads as q whatever ``n_kv_heads`` says.

    Example: ``reference_shapes(REFERENCE_CONFIG, "comfyui")`` has 453 entries of together 6,154,908,736 elements.
    Raises UsageError for an unknown layout.
    """
    config = {**REFERENCE_CONFIG, **config}
    patch = config["all_patch_size"][0] ** 2 * config["all_f_patch_size"][0] * config["in_channels"]
    refiners, siglip = config["n_refiner_layers"], config["siglip_feat_dim"]
    sizes = {"dim": config["dim"], "head": config["dim"] // config["n_heads"], "caption": config["cap_feat_dim"], "patch": patch,
             "noise_refiner": refiners, "context_refiner": refiners, "layers": config["n_layers"]}  # fmt: skip
    if siglip is not None:
        sizes |= {"siglip": siglip, "siglip_refiner": refiners}
    return Z_IMAGE.shapes(Z_IMAGE.derived(sizes), layout)
