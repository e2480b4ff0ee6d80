"""Qwen-Image (base, Edit, Layered): blocks of two streams, one set of names in both layouts.

Canonical names are those of diffusers' ``QwenImageTransformer2DModel``, which ComfyUI's class has too; nothing is fused, nothing is swapped. Edit 2511 and
its fine-tunes are told in a single file by an empty tensor, `MARKER`, and in diffusers' folders by ``zero_cond_t`` in config.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import Preset
from mergetool.arch.known import KnownFamily, Signature, Variant
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named

MARKER = "__index_timestep_zero__"
"""A tensor of no elements, by which ComfyUI gives reference pictures the time 0."""
LAYERS = "time_text_embed.addition_t_embedding"
"""The embedder of Layered: two rows, for pictures with and without transparency."""

_BLOCK = (
    Named("img_mod.1", groups=("img", "modulation"), shape=("6*dim", "dim"), bias=True),
    *(Named(f"attn.to_{x}", groups=("img", "attention", x), shape=("dim", "dim"), bias=True) for x in ("q", "k", "v")),
    *(
        Named(f"attn.add_{x}_proj", groups=("txt", "attention", x), shape=("dim", "dim"), bias=True)
        for x in ("q", "k", "v")
    ),
    Named("attn.norm_q", groups=("img", "attention", "norm"), shape=("head",)),
    Named("attn.norm_k", groups=("img", "attention", "norm"), shape=("head",)),
    Named("attn.norm_added_q", groups=("txt", "attention", "norm"), shape=("head",)),
    Named("attn.norm_added_k", groups=("txt", "attention", "norm"), shape=("head",)),
    Named("attn.to_out.0", groups=("img", "attention", "out"), shape=("dim", "dim"), bias=True),
    Named("attn.to_add_out", groups=("txt", "attention", "out"), shape=("dim", "dim"), bias=True),
    Named("img_mlp.net.0.proj", groups=("img", "ffn"), shape=("hidden", "dim"), bias=True),
    Named("img_mlp.net.2", groups=("img", "ffn"), shape=("dim", "hidden"), bias=True),
    Named("txt_mod.1", groups=("txt", "modulation"), shape=("6*dim", "dim"), bias=True),
    Named("txt_mlp.net.0.proj", groups=("txt", "ffn"), shape=("hidden", "dim"), bias=True),
    Named("txt_mlp.net.2", groups=("txt", "ffn"), shape=("dim", "hidden"), bias=True),
)
AXES: Mapping[int, tuple[int, int, int]] = {128: (16, 56, 56), 16: (4, 6, 6)}
"""Head width -> how it divides between the rotary axes: of the real models, and of the tests' small ones."""
_OWN = ("txt_norm.weight", "img_in.weight", "proj_out.weight", "transformer_blocks.0.attn.add_q_proj.weight")
_OTHERS: Mapping[str, tuple[int | None, ...] | None] = {
    "controlnet_x_embedder.weight": None,
    "controlnet_blocks.0.weight": None,
    "txt_norm.weight": (2560,),  # Mage-Flow
}
_OTHER_DEPTHS = range(38, 60)
"""Blocks whose numbers no other family with such names has: SD3.5 Large ends at 37."""


class QwenImage(KnownFamily):
    """Qwen-Image of any width and depth.

    Groups overlap. ``blocks`` are the transformer blocks; ``img`` and ``txt`` the two streams with what embeds their tokens; ``attention``, ``q``, ``k``,
    ``v``, ``out``, ``ffn``, ``modulation`` and ``norm`` run over both.

    - ``attention``: projections, outputs and norms of q and k.
    - ``modulation``: that of the blocks, a third of the model, and of the final layer.
    - ``norm``: the norms of q and k, and that of the text tokens.
    - ``embedder``: of image and text tokens, time, and layers. ``final``: the final layer and its modulation.
    """

    name = "Qwen-Image"
    names = (
        *(
            Named(f"time_text_embed.timestep_embedder.linear_{n}", groups=("embedder",), shape=("dim", columns), bias=True)
            for n, columns in ((1, 256), (2, "dim"))
        ),
        Named(LAYERS, groups=("embedder",), shape=("kinds", "dim")),
        Named("txt_norm", groups=("txt", "embedder", "norm"), shape=("context",)),
        Named("img_in", groups=("img", "embedder"), shape=("dim", "patch_in"), bias=True),
        Named("txt_in", groups=("txt", "embedder"), shape=("dim", "context"), bias=True),
        Named("transformer_blocks.{i}", groups=("blocks",), inside=_BLOCK),
        Named("norm_out.linear", groups=("final", "modulation"), shape=("2*dim", "dim"), bias=True),
        Named("proj_out", groups=("final",), shape=("patch_out", "dim"), bias=True),
        Named(MARKER, groups=("embedder",)),
    )  # fmt: skip
    signatures = tuple(Signature(layout, has=dict.fromkeys(_OWN), lacks=_OTHERS) for layout in KnownFamily.layouts)
    variants = (
        Variant("Edit 2511", has={MARKER: None}),
        Variant("Layered", has={f"{LAYERS}.weight": None}),
        Variant("base or Edit", lacks={MARKER: None}),
    )
    controls = (
        ("ControlNet", ("controlnet_blocks.0.weight", "transformer_blocks.0.img_mlp.net.0.proj.weight")),
        ("ControlNet (Fun)", ("control_blocks.0.after_proj.weight", "control_img_in.weight")),
    )
    marked: ClassVar[Mapping[str, str]] = {"zero_cond_t": MARKER}
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        "dim": ("img_in.bias", 0),
        "head": ("transformer_blocks.0.attn.norm_q.weight", 0),
        "hidden": ("transformer_blocks.0.img_mlp.net.0.proj.bias", 0),
        "context": ("txt_norm.weight", 0),
        "patch_in": ("img_in.weight", 1),
        "patch_out": ("proj_out.bias", 0),
        "kinds": (f"{LAYERS}.weight", 0),
    }
    optional = frozenset({"kinds"})
    group_order = (
        *("blocks", "img", "txt"),
        *("attention", "q", "k", "v", "out", "ffn", "modulation", "norm"),
        *("embedder", "final"),
    )
    # A third of the model is modulation: files of 20.4 GB have it in FP8 too.
    quantised = frozenset({"blocks"})
    precise = frozenset({"norm", "embedder", "final"})
    fp16 = "avoided"
    stock = (
        Stock("Edit 2511", ("Edit 2511",), ("2511",), of=("Edit 2509",)),
        Stock("Layered", ("Layered",), ("layered",), of=("Qwen-Image",)),
        Stock("Edit 2509", ("base or Edit",), ("2509",), of=("Edit",)),
        Stock("2512", ("base or Edit",), ("2512",), of=("Qwen-Image",)),
        Stock("Edit", ("base or Edit",), (r"\bedit\b",), of=("Qwen-Image",)),
        Stock("Qwen-Image", ("base or Edit",), (r"qwen-?image(/|$|\.|-bf16|-fp8|-q\d)",)),
    )
    lora_prefix = "transformer."
    lora_alphas = False  # beside an alpha diffusers puts the prefix there twice
    in_comfyui = frozenset({"transformer.", "lycoris_", ""})
    sampling = (SamplingDefaults("QwenImage", 50, "cfg", 4.0),)
    loader = "QwenImageLoraLoaderMixin"
    # the names of attention are also those of Flux.1's and SD3's blocks in diffusers
    lora_signs = (
        *("img_mlp", "txt_mlp", "img_mod", "txt_mod", "img_in", "txt_in"),
        *(f"transformer_blocks{dot}{i}{dot}" for i in _OTHER_DEPTHS for dot in "._"),
    )
    presets = (
        Preset("blocks-only", ("*=0", "blocks=1")),
        Preset("img-only", ("*=0", "blocks.img=1")),
        Preset("attention-only", ("*=0", "attention=1")),
        Preset("ffn-only", ("*=0", "ffn=1")),
        Preset("early-blocks", ("*=0", "blocks=linear(1,0)")),
        Preset("late-blocks", ("*=0", "blocks=linear(0,1)")),
    )

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`.

        None for heads of a width that no known model has: the shapes do not show how it divides between the rotary axes.
        """
        if sizes["head"] not in AXES or sizes["patch_out"] % 4:
            return None
        return {
            "_class_name": "QwenImageTransformer2DModel",
            "attention_head_dim": sizes["head"],
            "axes_dims_rope": list(AXES[sizes["head"]]),
            "guidance_embeds": False,
            "in_channels": sizes["patch_in"],
            "joint_attention_dim": sizes["context"],
            "num_attention_heads": sizes["dim"] // sizes["head"],
            "num_layers": sizes["transformer_blocks"],
            "out_channels": sizes["patch_out"] // 4,
            "patch_size": 2,
            "use_additional_t_cond": "kinds" in sizes,
            "use_layer3d_rope": "kinds" in sizes,
            "zero_cond_t": MARKER in parts,
        }


QWEN_IMAGE = QwenImage()

PUBLISHED: Mapping[str, int] = {
    "dim": 3072, "head": 128, "hidden": 12288, "patch_in": 64, "patch_out": 64, "context": 3584, "transformer_blocks": 60,
}  # fmt: skip
"""The sizes of every published one; Layered has two ``kinds`` of pictures."""
