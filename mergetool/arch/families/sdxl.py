"""SDXL: the UNet of Stable Diffusion XL (base, fine-tunes, inpainting, SSD-1B, Vega).

It has two layouts and one set of parts; see `unet`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mergetool.arch.anatomy import Lookalike
from mergetool.arch.families.unet import (
    CONTEXTUAL,
    CROSS_ATTENTION,
    UNet,
    block_weights,
    conditioned,
    measures,
    rows,
    signatures,
)
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named

POOLED, CONTEXT = 2816, 2048
"""Columns of the embedder of pooled text and sizes, and of attention to the prompt: no other UNet of Stable Diffusion has both."""
HEAD = 64
"""Rows of an attention head, which no shape shows."""
WIDTHS = ("width0", "width1", "width2")
"""Channels of each resolution, the full one first; KOALA has one residual block less in each."""

ATTENDED = (False, True, True)
"""The resolutions that have transformers."""
POOLED_EMBEDDER = (
    Named("add_embedding.linear_1", "label_emb.0.0", ("embedder",), shape=("4*width0", POOLED), bias=True),
    Named("add_embedding.linear_2", "label_emb.0.2", ("embedder",), shape=("4*width0", "4*width0"), bias=True),
)


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
    encoders = ("clip_l", "clip_g")
    names = rows(WIDTHS, ATTENDED, CONTEXT, others=POOLED_EMBEDDER)
    # KOALA has no second block in a resolution, a ControlNet no way out.
    signatures = signatures(
        {
            ("label_emb.0.0", "add_embedding.linear_1"): (None, POOLED),
            (f"input_blocks.5.1.{CONTEXTUAL}", f"down_blocks.1.attentions.1.{CONTEXTUAL}"): (None, CONTEXT),
        }
    )
    stock = (
        *conditioned("1.0"),
        Stock("NoobAI", words=("noobai",), of=("Illustrious",)),
        Stock("Illustrious", words=("illustrious",), of=("1.0",)),
        *(Stock(name, words=(name.lower(),), of=("1.0",)) for name in ("Pony", "Animagine")),
        Stock("Playground 2.5", words=("playground",)),
        *(Stock(name, words=(name.lower(),), of=("1.0",), distilled=True) for name in ("Turbo", "Lightning")),
        Stock("1.0", words=("xl-?base", r"xl-?v?1[.-]0", r"\bbase\b")),
    )
    measures = measures(WIDTHS)
    # ComfyUI reads the context's width off its columns, of which nvfp4 stores half as many.
    unquantised = frozenset({"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"})
    sampling = (SamplingDefaults("StableDiffusionXL", 50, "cfg", 5.0, unit=8),)
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

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`; it is unet/config.json.

        None where attentions of one resolution have not one depth, as SSD-1B's.
        """
        depths = _depths(sizes)
        if not depths or any(sizes[width] % HEAD for width in WIDTHS[1:]):
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
