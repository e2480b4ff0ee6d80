"""Lumina-Image 2 and NewBie: a diffusion transformer with two refiners, in two layouts.

Canonical names are those of diffusers' ``Lumina2Transformer2DModel``. The ComfyUI layout has the names that Z-Image has there, with q, k and v of a block as one
tensor: 24 heads have queries and 8 have keys, so that its rows are 2304, 768 and 768, which together divide by three as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import NATIVE, Preset
from mergetool.arch.known import KnownFamily, Like, Signature, Variant
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named

AXES: Mapping[int, tuple[int, int, int]] = {96: (32, 32, 32), 32: (8, 12, 12)}
"""Head width -> how it divides between the rotary axes: of the real model, and of the tests' small one."""


def _block(*first: Named) -> tuple[Named, ...]:
    """A block whose first norm is ``first``: where it is modulated, diffusers has the norm and its modulation in one module."""
    return (
        Named("attn.to_q", "attention.qkv[0]", ("attention", "q"), shape=("dim", "dim"), rows="=", heads="attn.norm_q"),
        Named("attn.to_k", "attention.qkv[1]", ("attention", "k"), shape=("keys", "dim"), heads="attn.norm_k"),
        Named("attn.to_v", "attention.qkv[2]", ("attention", "v"), shape=("keys", "dim"), heads="attn.norm_k"),
        Named("attn.to_out.0", "attention.out", ("attention", "out"), shape=("dim", "dim")),
        Named("attn.norm_q", "attention.q_norm", ("attention", "norm"), shape=("head",)),
        Named("attn.norm_k", "attention.k_norm", ("attention", "norm"), shape=("head",)),
        Named("feed_forward.linear_1", "feed_forward.w1", ("ffn",), shape=("hidden", "dim")),
        Named("feed_forward.linear_2", "feed_forward.w2", ("ffn",), shape=("dim", "hidden")),
        Named("feed_forward.linear_3", "feed_forward.w3", ("ffn",), shape=("hidden", "dim")),
        *first,
        Named("ffn_norm1", groups=("norm",), shape=("dim",)),
        Named("norm2", "attention_norm2", ("norm",), shape=("dim",)),
        Named("ffn_norm2", groups=("norm",), shape=("dim",)),
    )


_MODULATED = _block(
    Named("norm1.linear", "adaLN_modulation.1", ("adaln",), shape=("4*dim", "modulation"), bias=True),
    Named("norm1.norm", "attention_norm1", ("norm",), shape=("dim",)),
)
_PLAIN = _block(Named("norm1", "attention_norm1", ("norm",), shape=("dim",)))
_TIME, _CAPTION = "time_caption_embed.timestep_embedder", "time_caption_embed.caption_embedder"
_POOLED = "clip_text_pooled_proj.0.weight"
_PIXELS: Mapping[str, Like] = {"dec_net.cond_embed.weight": None}


class Lumina2(KnownFamily):
    """Lumina-Image 2 of any width and depth, NewBie included.

    Groups overlap. ``layers`` means the main layers only; ``attention``, ``q``, ``k``, ``v``, ``out``, ``ffn``, ``adaln`` and ``norm`` run over every block.

    - ``refiner``: ``noise_refiner`` and ``context_refiner`` together.
    - ``attention``: the whole attention module. ``q``, ``k``, ``v``, ``out`` are its projections only.
    - ``adaln``: the blocks' modulations and the final layer's. ``norm``: every norm.
    - ``embedder``: of patches, time and captions. ``pooled``: what NewBie adds for CLIP's pooled text.
    - ``final``: the final layer, and the unused ``norm_final.weight`` that some files carry.
    """

    name = "Lumina-Image 2"
    names = (
        Named("x_embedder", groups=("embedder",), shape=("dim", "patch"), bias=True),
        Named(f"{_TIME}.linear_1", "t_embedder.mlp.0", ("embedder",), shape=("modulation", 256), bias=True),
        Named(f"{_TIME}.linear_2", "t_embedder.mlp.2", ("embedder",), shape=("modulation", "modulation"), bias=True),
        Named(f"{_CAPTION}.0", "cap_embedder.0", ("embedder", "norm"), shape=("caption",)),
        Named(f"{_CAPTION}.1", "cap_embedder.1", ("embedder",), shape=("dim", "caption"), bias=True),
        Named("clip_text_pooled_proj.0", groups=("pooled", "norm"), shape=("pooled",)),
        Named("clip_text_pooled_proj.1", groups=("pooled",), shape=("pooled", "pooled"), bias=True),
        Named("time_text_embed.1", groups=("pooled",), shape=("modulation", "both"), bias=True),
        Named("noise_refiner.{i}", groups=("refiner", "noise_refiner"), inside=_MODULATED),
        Named("context_refiner.{i}", groups=("refiner", "context_refiner"), inside=_PLAIN),
        Named("layers.{i}", groups=("layers",), inside=_MODULATED),
        Named("norm_final", groups=("final", "norm")),
        Named("norm_out.linear_1", "final_layer.adaLN_modulation.1", ("final", "adaln"), shape=("dim", "modulation"), bias=True),
        Named("norm_out.linear_2", "final_layer.linear", ("final",), shape=("patch", "dim"), bias=True),
    )  # fmt: skip
    # Z-Image's modulation is adaLN_modulation.0.
    signatures = (
        Signature(
            "comfyui",
            has={
                "cap_embedder.1.weight": (None, None),
                "noise_refiner.0.attention.k_norm.weight": (None,),
                "noise_refiner.0.adaLN_modulation.1.weight": (None, None),
            },
            lacks=_PIXELS,
        ),
        Signature(
            "diffusers",
            has={
                f"{_CAPTION}.1.weight": (None, None),
                "layers.0.attn.to_q.weight": (None, None),
                "noise_refiner.0.norm1.linear.weight": (None, None),
            },
            lacks={"ref_image_patch_embedder.weight": None},  # OmniGen2
        ),
    )
    variants = (
        Variant("NewBie", {_POOLED: None}),
        Variant("Lumina-Image 2", {"x_embedder.weight": (2304, None)}, {_POOLED: None}),
    )
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {  # vectors are never quantised
        "dim": ("noise_refiner.0.norm2.weight", 0),
        "head": ("noise_refiner.0.attn.norm_k.weight", 0),
        "keys": ("noise_refiner.0.attn.to_k.weight", 0),
        "hidden": ("noise_refiner.0.feed_forward.linear_1.weight", 0),
        "modulation": (f"{_TIME}.linear_2.bias", 0),
        "caption": (f"{_CAPTION}.0.weight", 0),
        "patch": ("norm_out.linear_2.bias", 0),
        "pooled": (_POOLED, 0),
    }
    optional = frozenset({"pooled"})
    group_order = (
        *("refiner", "noise_refiner", "context_refiner", "layers"),
        *("attention", "q", "k", "v", "out", "ffn", "adaln", "norm"),
        *("embedder", "pooled", "final"),
    )
    unused = frozenset({"norm_final.weight"})
    main = "layers"
    precise = frozenset({"refiner", "norm", "adaln", "embedder", "pooled", "final"})
    quantised_layout = "comfyui"  # ComfyUI does not join the scales of q, k and v
    fp16 = "avoided"
    stock = (
        Stock("Neta Lumina", ("Lumina-Image 2",), ("neta",), of=("Lumina-Image 2",)),
        Stock("Lumina-Image 2", ("Lumina-Image 2",), ("lumina",)),
    )
    # diffusers splits q, k and v of such names, where a file has every module of each of its blocks and nothing else
    lora_layout = "comfyui"
    lora_alphas = False
    in_comfyui = frozenset(
        {"transformer.", "lycoris_", ""}
    )  # for what is called as in Z-Image: see `modules_in_comfyui`
    sampling = (SamplingDefaults("Lumina2", 30, "cfg", 4.0),)
    loader = "Lumina2LoraLoaderMixin"
    presets = (
        Preset("refiners-kept", ("refiner=0",)),
        Preset("layers-only", ("*=0", "layers=1")),
        Preset("attention-only", ("*=0", "layers.attention=1")),
        Preset("ffn-only", ("*=0", "layers.ffn=1")),
        Preset("early-layers", ("*=0", "layers=linear(1,0)")),
        Preset("late-layers", ("*=0", "layers=linear(0,1)")),
    )

    def modules_in_comfyui(self, part: str, prefix: str) -> list[str]:
        """ComfyUI's own names of a module.

        Behind more prefixes it knows those that are diffusers' names of Z-Image, whose map it has for this model too.
        """
        own = self.stored_name(part, "comfyui")
        alike = ".feed_forward." in own or own.startswith(("cap_embedder.", "t_embedder."))
        return [own] if prefix in NATIVE or (alike and prefix in self.in_comfyui) else []

    def derived(self, sizes: dict[str, int]) -> dict[str, int]:
        """The columns of NewBie's embedder of time and pooled text together."""
        return {**sizes, "both": sizes["modulation"] + sizes["pooled"]} if "pooled" in sizes else sizes

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`.

        None for heads of a width that no known model has, and for NewBie, for which diffusers has no class.
        """
        if sizes["head"] not in AXES or "pooled" in sizes:
            return None
        return {
            "_class_name": "Lumina2Transformer2DModel",
            "axes_dim_rope": list(AXES[sizes["head"]]),
            "axes_lens": [300, 512, 512],
            "cap_feat_dim": sizes["caption"],
            "ffn_dim_multiplier": None,
            "hidden_size": sizes["dim"],
            "in_channels": sizes["patch"] // 4,
            "multiple_of": 256,
            "norm_eps": 1e-5,
            "num_attention_heads": sizes["dim"] // sizes["head"],
            "num_kv_heads": sizes["keys"] // sizes["head"],
            "num_layers": sizes["layers"],
            "num_refiner_layers": sizes["noise_refiner"],
            "patch_size": 2,
            "sample_size": 128,
        }


LUMINA2 = Lumina2()

PUBLISHED: Mapping[str, int] = {
    "dim": 2304, "head": 96, "keys": 768, "hidden": 9216, "modulation": 1024, "caption": 2304, "patch": 64,
    "noise_refiner": 2, "context_refiner": 2, "layers": 26,
}  # fmt: skip
"""The sizes of Lumina-Image 2."""
