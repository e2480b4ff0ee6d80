"""SDXL: the UNet of Stable Diffusion XL (base, fine-tunes, inpainting, SSD-1B, Vega).

It has two layouts and one set of parts; see `unet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import Anatomy, Lookalike
from mergetool.arch.families.unet import CROSS_ATTENTION, UNet, block_weights, way
from mergetool.arch.known import Signature
from mergetool.arch.table import Named

POOLED, CONTEXT = 2816, 2048
"""Columns of the embedder of pooled text and sizes, and of attention to the prompt: no other UNet of Stable Diffusion has both."""
HEAD = 64
"""Rows of an attention head, which no shape shows."""
WIDTHS = ("width0", "width1", "width2")
"""Channels of each resolution, the full one first; KOALA has one residual block less in each."""


class SDXL(UNet):
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
        *way(WIDTHS, (False, True, True), CONTEXT),
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
    # ComfyUI reads the context's width off its columns, of which nvfp4 stores half as many.
    unquantised = frozenset({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"})
    loader = "StableDiffusionXLLoraLoaderMixin"
    presets = block_weights(9)
    lookalike = Lookalike(
        name="Stable Diffusion 1, 2 or SDXL's refiner",
        widths=frozenset({768, 1024, 1280}),
        own=CONTEXT,
        reading=CROSS_ATTENTION,
        fused="",
        ratio=0,
        word="sd_v",
        own_words=("xl",),
    )

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
