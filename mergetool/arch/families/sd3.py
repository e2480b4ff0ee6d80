"""Stable Diffusion 3 and 3.5: joint blocks of an image and a text stream, in two layouts.

Canonical names are those of diffusers' ``SD3Transformer2DModel``. Stability AI's own layout, which ComfyUI has, stores q, k and v as one tensor. Two modulations
are (shift, scale) there and (scale, shift) in diffusers: that of the final layer, and the text stream's of the last block, which has two parts in place of six
since the stream ends there. Which it is shows in the rows of each tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import InputEmbedder, Preset
from mergetool.arch.known import KnownFamily, Like, Signature, Variant
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named

HEAD = 64
"""Rows of an attention head. The published models have as many blocks as heads, which ComfyUI relies on."""
_QKV = ("q", "k", "v")


def _second(name: str, comfyui: str, groups: tuple[str, ...], width: str) -> tuple[Named, ...]:
    """An attention of the image stream; in 3.5 Medium the first blocks have two."""
    return (
        *(
            Named(f"{name}.to_{x}", f"{comfyui}.qkv[{i}]", (*groups, x), shape=(width, width), bias=True)
            for i, x in enumerate(_QKV)
        ),
        Named(f"{name}.norm_q", f"{comfyui}.ln_q", (*groups, "norm"), shape=("head",)),
        Named(f"{name}.norm_k", f"{comfyui}.ln_k", (*groups, "norm"), shape=("head",)),
        Named(f"{name}.to_out.0", f"{comfyui}.proj", (*groups, "out"), shape=(width, width), bias=True),
    )


_MODULATION = "norm1_context.linear"
_BLOCK = (
    Named("norm1.linear", "x_block.adaLN_modulation.1", ("img", "modulation"), shape=("6*dim", "dim"), bias=True),
    Named(_MODULATION, "context_block.adaLN_modulation.1", ("txt", "modulation"), shape=("6*dim", "dim"), bias=True),
    *(  # as the last block has it
        Named(f"{_MODULATION}.{half}", f"context_block.adaLN_modulation.1[{1 - i}]", ("txt", "modulation"),
              diffusers=f"{_MODULATION}[{i}]", shape=("dim", "dim"), bias=True, rows="=")
        for i, half in enumerate(("scale", "shift"))
    ),
    *_second("attn", "x_block.attn", ("img", "attention"), "dim"),
    *(
        Named(f"attn.add_{x}_proj", f"context_block.attn.qkv[{i}]", ("txt", "attention", x), shape=("dim", "dim"), bias=True)
        for i, x in enumerate(_QKV)
    ),
    Named("attn.norm_added_q", "context_block.attn.ln_q", ("txt", "attention", "norm"), shape=("head",)),
    Named("attn.norm_added_k", "context_block.attn.ln_k", ("txt", "attention", "norm"), shape=("head",)),
    Named("attn.to_add_out", "context_block.attn.proj", ("txt", "attention", "out"), shape=("dim", "dim"), bias=True),
    *_second("attn2", "x_block.attn2", ("img", "attention", "attn2"), "second"),
    Named("ff.net.0.proj", "x_block.mlp.fc1", ("img", "ffn"), shape=("4*dim", "dim"), bias=True),
    Named("ff.net.2", "x_block.mlp.fc2", ("img", "ffn"), shape=("dim", "4*dim"), bias=True),
    Named("ff_context.net.0.proj", "context_block.mlp.fc1", ("txt", "ffn"), shape=("4*dim", "dim"), bias=True),
    Named("ff_context.net.2", "context_block.mlp.fc2", ("txt", "ffn"), shape=("dim", "4*dim"), bias=True),
)  # fmt: skip
_ENDED = (f"{_MODULATION}.", "attn.to_add_out.", "ff_context.")
"""Modules of the text stream in all blocks but the last, where its modulation is in halves."""
_HALVES = (f".{_MODULATION}.scale.", f".{_MODULATION}.shift.")
_PATCHES, _SECOND = "pos_embed.proj.weight", "transformer_blocks.0.attn2.to_q.weight"
# The ControlNets have names of theirs, the 8B's too.
_CONTROL: Mapping[str, Like] = dict.fromkeys(("controlnet_blocks.0.weight", "pos_embed_input.proj.weight"))

_LARGE = "3.5 Large or Large Turbo"


class StableDiffusion3(KnownFamily):
    """Stable Diffusion 3 and 3.5 of any width and depth.

    Groups overlap. ``blocks`` are the joint blocks, ``img`` and ``txt`` their two streams with what embeds their tokens.

    - ``attention``: projections, outputs and norms of q and k, of both streams and the second attention; ``attn2``: the latter alone.
    - ``q``, ``k``, ``v``, ``out``: projections. ``ffn``: the feed-forwards. ``modulation``: that of the blocks and of the final layer.
    - ``norm``: the norms of q and k, which SD3 has not. ``position``: the table of positions, which is computed and not trained.
    - ``embedder``: of patches, text tokens, time and pooled text. ``final``: the final layer and its modulation.
    """

    name = "SD3"
    encoders = ("clip_l", "clip_g", "t5xxl")
    names = (
        Named("pos_embed.proj", "x_embedder.proj", ("img", "embedder"), shape=("dim", "channels", 2, 2), bias=True),
        Named("pos_embed.pos_embed", "pos_embed", ("position",), shape=(1, "positions", "dim"), tensor=True),
        Named("context_embedder", groups=("txt", "embedder"), shape=("dim", "context"), bias=True),
        *(
            Named(f"time_text_embed.{theirs}.linear_{n}", f"{ours}.mlp.{2 * n - 2}", ("embedder",), bias=True,
                  shape=("dim", columns if n == 1 else "dim"))
            for theirs, ours, columns in (("timestep_embedder", "t_embedder", 256), ("text_embedder", "y_embedder", "pooled"))
            for n in (1, 2)
        ),
        Named("transformer_blocks.{i}", "joint_blocks.{i}", ("blocks",), inside=_BLOCK),
        *(
            Named(f"norm_out.linear.{half}", f"final_layer.adaLN_modulation.1[{1 - i}]", ("final", "modulation"),
                  diffusers=f"norm_out.linear[{i}]", shape=("dim", "dim"), bias=True)
            for i, half in enumerate(("scale", "shift"))
        ),
        Named("proj_out", "final_layer.linear", ("final",), shape=("output", "dim"), bias=True),
    )  # fmt: skip
    signatures = (
        Signature(
            "comfyui",
            has={
                "joint_blocks.0.context_block.attn.qkv.weight": (None, None),
                "x_embedder.proj.weight": (None,) * 4,
                "y_embedder.mlp.0.weight": (None, None),
            },
            lacks=_CONTROL,
        ),
        Signature(
            "diffusers",
            has={
                "transformer_blocks.0.attn.add_q_proj.weight": (None, None),
                _PATCHES: (None,) * 4,
                "time_text_embed.text_embedder.linear_1.weight": (None, None),
            },
            lacks=_CONTROL,
        ),
    )
    variants = (
        Variant("3.5 Medium", {_SECOND: (1536, 1536)}),
        Variant(_LARGE, {_PATCHES: (2432, None, 2, 2)}),
        Variant("3 Medium", {_PATCHES: (1536, None, 2, 2)}, {"transformer_blocks.0.attn.norm_q.weight": None}),
    )
    controls = (("ControlNet", ("controlnet_blocks.0.weight", "pos_embed_input.proj.weight")),)
    input_embedder = InputEmbedder(_PATCHES, "proj_out.weight", 4)
    stock = (
        Stock("3.5 Medium", ("3.5 Medium",), ("3.5-medium",)),
        Stock("3.5 Large Turbo", (_LARGE,), ("turbo",), of=("3.5 Large",), distilled=True),
        Stock("3.5 Large", (_LARGE,), ("large",)),
        Stock("3 Medium", ("3 Medium",), ("3-medium",)),
    )
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        "dim": ("pos_embed.proj.bias", 0),
        "channels": (_PATCHES, 1),
        "output": ("proj_out.bias", 0),
        "context": ("context_embedder.weight", 1),
        "pooled": ("time_text_embed.text_embedder.linear_1.weight", 1),
        "positions": ("pos_embed.pos_embed", 1),
        "head": ("transformer_blocks.0.attn.norm_q.weight", 0),
        "second": ("transformer_blocks.0.attn2.to_out.0.bias", 0),
    }
    optional = frozenset({"positions", "head", "second"})
    group_order = (
        *("blocks", "img", "txt", "attention", "attn2", "q", "k", "v", "out", "ffn", "modulation", "norm"),
        *("position", "embedder", "final"),
    )
    untrained = "position"
    # Modulations of the blocks are a third of 3.5 Large: 5.4 of 16.3 GB.
    quantised = frozenset({"attention", "ffn", "modulation"})
    precise = frozenset({"norm", "position", "embedder", "final"})
    quantised_layout = "comfyui"  # ComfyUI does not join the scales of q, k and v
    lora_prefix = "transformer."
    lora_alphas = False  # diffusers rejects a file with one
    in_comfyui = frozenset({"transformer.", "base_model.model.", "lora_transformer_", "lycoris_"})
    sampling = (SamplingDefaults("StableDiffusion3", 28, "cfg", 7.0),)
    loader = "SD3LoraLoaderMixin"
    # the other names are also those of Flux.1's, Qwen-Image's and other families' blocks in diffusers
    lora_signs = ("joint_blocks", ("add_q_proj", "attn2"))
    lora_widths = frozenset({1536, 2432})
    presets = (
        Preset("attention-only", ("*=0", "attention=1")),
        Preset("ffn-only", ("*=0", "ffn=1")),
        Preset("early-blocks", ("*=0", "blocks=linear(1,0)")),
        Preset("late-blocks", ("*=0", "blocks=linear(0,1)")),
    )

    def _part_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """See `KnownFamily`: the text stream ends in the last block; of the first as many as ``dual_blocks`` have a second attention and what modulates it."""
        parts = super()._part_shapes(sizes)
        depth, dual = sizes.get("transformer_blocks", 0), sizes.get("dual_blocks", 0)
        found: dict[str, tuple[int, ...]] = {}
        for part, shape in parts.items():
            stack, _, rest = part.partition(".")
            number, _, inner = rest.partition(".")
            is_last, is_dual = number == str(depth - 1), number.isdigit() and int(number) < dual
            if stack == "transformer_blocks":
                if any(half in part for half in _HALVES) != is_last and _MODULATION in part:
                    continue
                if (is_last and inner.startswith(_ENDED[1:])) or (inner.startswith("attn2.") and not is_dual):
                    continue
                if is_dual and inner.startswith("norm1.linear"):
                    shape = (9 * sizes["dim"], *shape[1:])
            found[part] = shape
        return found

    def parts_to_depth(self, depth: int, modules: Collection[str]) -> list[str]:
        """See `Family.parts_to_depth`: every block with all that one may have.

        Nothing tells the last, whose halves `alternative` finds.
        """
        every = {f"{size}": 1 for size in (*self.measures, "dual_blocks")} | {
            "transformer_blocks": depth,
            "dual_blocks": depth,
        }
        return [part for part in super()._part_shapes(every) if not any(half in part for half in _HALVES)]

    def measured(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
        """See `KnownFamily.measured`, with the number of blocks that have a second attention."""
        found = super().measured(shapes)
        return found and {**found, "dual_blocks": sum(name.endswith(".attn2.to_q.bias") for name in shapes)}

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`; None where the width is not of whole heads."""
        if sizes["dim"] % HEAD or "positions" not in sizes:
            return None
        return {
            "_class_name": "SD3Transformer2DModel",
            "attention_head_dim": HEAD,
            "caption_projection_dim": sizes["dim"],
            "dual_attention_layers": list(range(sizes["dual_blocks"])),
            "in_channels": sizes["channels"],
            "joint_attention_dim": sizes["context"],
            "num_attention_heads": sizes["dim"] // HEAD,
            "num_layers": sizes["transformer_blocks"],
            "out_channels": sizes["output"] // 4,
            "patch_size": 2,
            "pooled_projection_dim": sizes["pooled"],
            "pos_embed_max_size": round(sizes["positions"] ** 0.5),
            "qk_norm": "rms_norm" if "head" in sizes else None,
            "sample_size": 128,
        }


SD3 = StableDiffusion3()

MEDIUM: Mapping[str, int] = {
    "dim": 1536,
    "channels": 16,
    "output": 64,
    "context": 4096,
    "pooled": 2048,
    "positions": 36864,
    "transformer_blocks": 24,
}
"""The sizes of SD3 Medium."""
MEDIUM_3_5: Mapping[str, int] = {**MEDIUM, "positions": 147456, "head": 64, "second": 1536, "dual_blocks": 13}
"""The sizes of SD3.5 Medium."""
LARGE: Mapping[str, int] = {**MEDIUM, "dim": 2432, "head": 64, "transformer_blocks": 38}
"""The sizes of SD3.5 Large and Large Turbo."""
