"""SDXL: the UNet of Stable Diffusion XL, two layouts, one set of parts.

It is also that of fine-tunes, inpainting, SSD-1B and Vega.

Canonical names are those of diffusers' ``UNet2DConditionModel``. The ComfyUI layout is that of the first release (sgm), which numbers along the whole path
what diffusers numbers within each resolution: ``input_blocks.4.1`` is ``down_blocks.1.attentions.0``. Nothing is fused in either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import NATIVE, Anatomy, Lookalike
from mergetool.arch.known import KnownFamily, Signature
from mergetool.arch.table import Named

POOLED, CONTEXT = 2816, 2048
"""Columns of the embedder of pooled text and sizes, and of attention to the prompt: no other UNet of Stable Diffusion has both."""
HEAD = 64
"""Rows of an attention head, which no shape shows."""
WIDTHS = ("width0", "width1", "width2")
"""Channels of each resolution, the full one first. Each has two residual blocks on the way down and three on the way up; KOALA has one less."""

# Channels of the residual blocks of the way up: of what came last and of what the way down had there, one behind the other.
_JOINED = (
    ("2*width2", "2*width2", "width2+width1"),
    ("width2+width1", "2*width1", "width1+width0"),
    ("width1+width0", "2*width0", "2*width0"),
)


def _attention(name: str, columns: int | str, width: str) -> Named:
    inside = (
        Named("to_q", groups=("q",), shape=(width, width)),
        Named("to_k", groups=("k",), shape=(width, columns)),
        Named("to_v", groups=("v",), shape=(width, columns)),
        Named("to_out.0", groups=("out",), shape=(width, width), bias=True),
    )
    return Named(name, groups=("attention", name), inside=inside)


def _transformer(name: str, comfyui: str, stack: str, width: str) -> Named:
    """The rows of a transformer, whose names differ between layouts in their place only.

    The first matrix of a feed-forward has its values' rows and its gates'.
    """
    block = (
        Named("norm1", groups=("norm",), shape=(width,), bias=True),
        _attention("attn1", width, width),
        Named("norm2", groups=("norm",), shape=(width,), bias=True),
        _attention("attn2", CONTEXT, width),
        Named("norm3", groups=("norm",), shape=(width,), bias=True),
        Named("ff.net.0.proj", groups=("ffn",), shape=(f"8*{width}", width), bias=True),
        Named("ff.net.2", groups=("ffn",), shape=(width, f"4*{width}"), bias=True),
    )
    inside = (
        Named("norm", groups=("norm",), shape=(width,), bias=True),
        Named("proj_in", groups=("proj",), shape=(width, width), bias=True),
        Named("transformer_blocks.{i}", inside=block),
        Named("proj_out", groups=("proj",), shape=(width, width), bias=True),
    )
    return Named(name, comfyui, (stack,), inside)


def _resnet(name: str, comfyui: str, stack: str, columns: str, rows: str) -> Named:
    """A residual block. Where it changes the number of channels it has a shortcut."""
    inside = (
        Named("norm1", "in_layers.0", ("norm",), shape=(columns,), bias=True),
        Named("conv1", "in_layers.2", shape=(rows, columns, 3, 3), bias=True),
        Named("time_emb_proj", "emb_layers.1", shape=(rows, "4*width0"), bias=True),
        Named("norm2", "out_layers.0", ("norm",), shape=(rows,), bias=True),
        Named("conv2", "out_layers.3", shape=(rows, rows, 3, 3), bias=True),
        Named("conv_shortcut", "skip_connection", shape=None if rows == columns else (rows, columns, 1, 1), bias=True),
    )
    return Named(name, comfyui, (stack, "resnet"), inside)


def _down() -> Iterator[Named]:
    stack, last = "input_blocks", len(WIDTHS) - 1
    for level, width in enumerate(WIDTHS):
        own, n = f"down_blocks.{level}", 3 * level + 1
        for i, columns in enumerate((WIDTHS[max(0, level - 1)], width)):
            yield _resnet(f"{own}.resnets.{i}", f"{stack}.{n + i}.0", stack, columns, width)
            if level:
                yield _transformer(f"{own}.attentions.{i}", f"{stack}.{n + i}.1", stack, width)
        if level < last:
            shape = (width, width, 3, 3)
            yield Named(
                f"{own}.downsamplers.0.conv", f"{stack}.{n + 2}.0.op", (stack, "resnet"), shape=shape, bias=True
            )


def _up() -> Iterator[Named]:
    stack, last = "output_blocks", len(WIDTHS) - 1
    for level, width in enumerate(reversed(WIDTHS)):
        own, n = f"up_blocks.{level}", 3 * level
        for i, columns in enumerate(_JOINED[level]):
            yield _resnet(f"{own}.resnets.{i}", f"{stack}.{n + i}.0", stack, columns, width)
            if level < last:
                yield _transformer(f"{own}.attentions.{i}", f"{stack}.{n + i}.1", stack, width)
        if level < last:
            shape = (width, width, 3, 3)
            yield Named(
                f"{own}.upsamplers.0.conv", f"{stack}.{n + 2}.2.conv", (stack, "resnet"), shape=shape, bias=True
            )


class SDXL(KnownFamily):
    """SDXL of any width and depth, with any number of input channels.

    Groups overlap.

    - ``input_blocks``, ``middle_block``, ``output_blocks``: 0 to 8 (0 is ``conv_in``), 0 to 2, 0 to 8, as ComfyUI and block-weight tools number them.
    - ``attn1``: self-attention, ``attn2``: attention to the prompt, ``attention``: both; ``q``, ``k``, ``v``, ``out``: their projections.
    - ``ffn``: the feed-forwards. ``proj``: the matrices before and behind the transformer blocks.
    - ``resnet``: residual blocks, and the convolutions that change the resolution between them.
    - ``norm``: every norm, weights and biases. ``embedder``: those of time, and of pooled text and sizes.
    - ``conv_in``, and ``final``: the first convolution, and the last with its norm.
    """

    name = "SDXL"
    names = (
        Named("time_embedding.linear_1", "time_embed.0", ("embedder",), shape=("4*width0", "width0"), bias=True),
        Named("time_embedding.linear_2", "time_embed.2", ("embedder",), shape=("4*width0", "4*width0"), bias=True),
        Named("add_embedding.linear_1", "label_emb.0.0", ("embedder",), shape=("4*width0", POOLED), bias=True),
        Named("add_embedding.linear_2", "label_emb.0.2", ("embedder",), shape=("4*width0", "4*width0"), bias=True),
        Named("conv_in", "input_blocks.0.0", ("input_blocks", "conv_in"), shape=("width0", "input", 3, 3), bias=True),
        *_down(),
        _resnet("mid_block.resnets.0", "middle_block.0", "middle_block", "width2", "width2"),
        _transformer("mid_block.attentions.0", "middle_block.1", "middle_block", "width2"),
        _resnet("mid_block.resnets.1", "middle_block.2", "middle_block", "width2", "width2"),
        *_up(),
        Named("conv_norm_out", "out.0", ("final", "norm"), shape=("width0",), bias=True),
        Named("conv_out", "out.2", ("final",), shape=("output", "width0", 3, 3), bias=True),
    )
    # KOALA has no second block in a resolution, a ControlNet no way out.
    signatures = tuple(
        Signature(
            layout,
            has={
                f"{first}.weight": (None, None, 3, 3),
                f"{last}.weight": (None, None, 3, 3),
                f"{embedder}.weight": (None, POOLED),
                f"{place}.transformer_blocks.0.attn2.to_k.weight": (None, CONTEXT),
            },
        )
        for layout, first, last, embedder, place in (
            ("comfyui", "input_blocks.0.0", "out.2", "label_emb.0.0", "input_blocks.5.1"),
            ("diffusers", "conv_in", "conv_out", "add_embedding.linear_1", "down_blocks.1.attentions.1"),
        )
    )
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        **{width: (f"down_blocks.{level}.resnets.0.norm2.weight", 0) for level, width in enumerate(WIDTHS)},
        "input": ("conv_in.weight", 1),
        "output": ("conv_out.bias", 0),
    }
    group_order = (
        *("input_blocks", "middle_block", "output_blocks"),
        *("attention", "attn1", "attn2", "q", "k", "v", "out", "ffn", "proj", "resnet", "norm"),
        *("embedder", "conv_in", "final"),
    )
    quantised = frozenset({"attention", "ffn", "proj"})
    precise = frozenset({"norm", "embedder", "resnet", "conv_in", "final"})
    # ComfyUI reads the context's width off its columns, of which nvfp4 stores half as many.
    unquantised = frozenset({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"})
    quantised_layout = "comfyui"  # of diffusers' layout ComfyUI renames weights and biases, and loses scales

    component = "unet"
    lora_prefix = "lora_unet_"  # before ComfyUI's names: of diffusers' it does not know PEFT's of attentions
    lora_alphas = False  # of several diffusers gives attentions the commonest
    in_comfyui = frozenset({"lora_unet_", "lycoris_", "unet.", ""})
    loader = "StableDiffusionXLLoraLoaderMixin"
    lora_signs = (
        *("input_blocks", "middle_block", "output_blocks", "down_blocks", "mid_block", "up_blocks"),
        *("time_embed", "label_emb", "add_embedding", "conv_in", "conv_out"),
    )
    lookalike = Lookalike(
        name="Stable Diffusion 1, 2 or SDXL's refiner",
        widths=frozenset({768, 1024, 1280}),
        own=CONTEXT,
        reading=("attn2.to_k", "attn2.to_v"),
        fused="",
        ratio=0,
        word="sd_v",
        own_words=("xl",),
    )

    def aliases(self, parts: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Projections of attentions in diffusers' older spellings.

        They stand behind ``processor``; ``to_out`` has no number.
        """
        names: dict[str, tuple[str, ...]] = {}
        for part in parts:
            module = part.removesuffix(".weight")
            if ".to_" in module and module != part:
                for name in (module, module.removesuffix(".0")):
                    names |= {name: (part,), name.replace(".to_", ".processor.to_"): (part,)}
        return names

    def modules_in_comfyui(self, part: str, prefix: str) -> list[str]:
        """Its own names, and diffusers'. Where they have dots, attentions have the older spelling alone."""
        names = [self.stored_name(part, "comfyui")] if prefix in NATIVE else []
        if prefix in ("unet.", ""):
            module, dot, leaf = part.rpartition(".")
            old = module.replace(".to_", ".processor.to_")
            return [*names, f"{old.removesuffix('.0') if old.endswith('.to_out.0') else old}{dot}{leaf}"]
        return [*names, part] if prefix in self.in_comfyui else names

    def block_of(self, part: str) -> tuple[str, int] | None:
        """The block as ComfyUI numbers it: ``input_blocks.4`` for ``down_blocks.1.attentions.0``.

        Block-weight tools do the same.
        """
        stack = self.groups(part, ()) & {"input_blocks", "middle_block", "output_blocks"}
        return super().block_of(self.stored_name(part, "comfyui")) if stack else None

    def derived(self, sizes: dict[str, int]) -> dict[str, int]:
        """The channels of two resolutions together."""
        joined = {name for columns in _JOINED for name in columns if "+" in name}
        return {name: sum(sizes[width] for width in name.split("+")) for name in joined} | sizes

    def config(self, anatomy: Anatomy) -> dict[str, Any] | None:
        """The unet/config.json that goes with the shapes of ``anatomy``.

        None where tensors that show a size are missing, or attentions of one resolution have not one depth, as SSD-1B's.
        """
        sizes = self.measured({name: part.shape for name, part in anatomy.parts.items()})
        depths = sizes and _depths(sizes)
        if not sizes or not depths or any(sizes[width] % HEAD for width in WIDTHS[1:]):
            return None
        return {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 128,
            "in_channels": sizes["input"],
            "out_channels": sizes["output"],
            "block_out_channels": [sizes[width] for width in WIDTHS],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "layers_per_block": 2,
            "transformer_layers_per_block": depths,
            "attention_head_dim": [max(1, sizes[width] // HEAD) for width in WIDTHS],  # how many, in spite of the name
            "cross_attention_dim": CONTEXT,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": POOLED,
        }


SDXL_UNET = SDXL()


_ATTENTIONS = (("down_blocks.1.", "up_blocks.1."), ("down_blocks.2.", "mid_block.", "up_blocks.0."))
"""The places of the second and the third resolution."""


def _depths(sizes: Mapping[str, int]) -> list[int] | None:
    """The number of transformer blocks in the attentions of each resolution; None where they differ."""
    depths = [{depth for stack, depth in sizes.items() if stack.startswith(places)} for places in _ATTENTIONS]
    return [1, *(depth for (depth,) in depths)] if all(len(found) == 1 for found in depths) else None
