"""Stable Diffusion 1 (1.4, 1.5, inpainting): its UNet in two layouts; see `unet`."""

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

CONTEXT = 768
"""The columns of attention to the prompt; Stable Diffusion 2 has 1024."""
HEADS = 8
"""The number of heads of every attention, which no shape shows."""
WIDTHS = ("width0", "width1", "width2", "width2")
"""Channels of each resolution, the full one first; the smallest has no transformers."""

ATTENDED, KERNEL = (True, True, True, False), (1, 1)
"""The resolutions that have transformers, and the kernel of the convolutions before and behind those."""


class StableDiffusion1(UNet):
    """Stable Diffusion 1 of any width, with any number of input channels.

    Groups overlap.

    - ``input_blocks``, ``middle_block``, ``output_blocks``: 0 to 11 (0 is ``conv_in``), 0 to 2, 0 to 11, as ComfyUI and block-weight tools number them.
    - ``attn1``: self-attention, ``attn2``: attention to the prompt, ``attention``: both; ``q``, ``k``, ``v``, ``out``: their projections.
    - ``ffn``: the feed-forwards. ``proj``: the convolutions before and behind the transformer blocks.
    - ``resnet``: residual blocks, and the convolutions that change the resolution between them.
    - ``norm``: every norm, weights and biases. ``embedder``: that of time.
    - ``conv_in``, and ``final``: the first convolution, and the last with its norm.
    """

    name = "SD1.5"
    encoders = ("clip_l",)
    names = rows(WIDTHS, ATTENDED, CONTEXT, KERNEL)
    # A ControlNet has no way out, distilled ones fewer blocks, later ones a second embedder.
    signatures = signatures(
        {
            ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"): (None, None, 3, 3),
            (f"input_blocks.2.1.{CONTEXTUAL}", f"down_blocks.0.attentions.1.{CONTEXTUAL}"): (None, CONTEXT),
            ("input_blocks.2.1.proj_in", "down_blocks.0.attentions.1.proj_in"): (None, None, 1, 1),
        },
        lacks=("label_emb.0.0.weight", "add_embedding.linear_1.weight"),
    )
    stock = (
        *conditioned("1.5"),
        Stock("1.4", words=("v1-4", r"1\.4")),
        Stock("1.5", words=("v1-5", r"sd-?1\.?5", r"diffusion-?1\.5")),
    )
    measures = measures(WIDTHS)
    # ComfyUI reads the context's width off its columns, of which nvfp4 stores half as many.
    unquantised = frozenset({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"})
    presets = block_weights(12)
    sampling = (SamplingDefaults("StableDiffusion", 50, "cfg", 7.5, unit=8),)
    loader = "StableDiffusionLoraLoaderMixin"
    lookalike = Lookalike(
        name="Stable Diffusion 2, SDXL or its refiner",
        widths=frozenset({1024, 1280, 2048}),
        own=CONTEXT,
        reading=CROSS_ATTENTION,
        fused="",
        ratio=0,
        word="sd_v2",
        own_words=("sd_v1",),
    )
    flat_layout = "diffusers"  # as sd-scripts writes LoRAs of it, and diffusers alone knows

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`; it is unet/config.json."""
        if any(sizes[width] % HEADS for width in WIDTHS):
            return None
        return {
            "_class_name": "UNet2DConditionModel",
            "sample_size": 64,
            "in_channels": sizes["input"],
            "out_channels": sizes["output"],
            "block_out_channels": [sizes[width] for width in WIDTHS],
            "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
            "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
            "layers_per_block": 2,
            "attention_head_dim": HEADS,  # how many, in spite of the name
            "cross_attention_dim": CONTEXT,
        }


SD15 = StableDiffusion1()
