"""Stable Diffusion 1 (1.4, 1.5, inpainting): its UNet in two layouts; see `unet`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import Anatomy, Lookalike
from mergetool.arch.families.unet import CROSS_ATTENTION, UNet, block_weights, way
from mergetool.arch.known import Signature, Variant
from mergetool.arch.table import Named

CONTEXT = 768
"""The columns of attention to the prompt; Stable Diffusion 2 has 1024."""
HEADS = 8
"""The number of heads of every attention, which no shape shows."""
WIDTHS = ("width0", "width1", "width2", "width2")
"""Channels of each resolution, the full one first; the smallest has no transformers."""


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
    names = (
        Named("time_embedding.linear_1", "time_embed.0", ("embedder",), shape=("4*width0", "width0"), bias=True),
        Named("time_embedding.linear_2", "time_embed.2", ("embedder",), shape=("4*width0", "4*width0"), bias=True),
        *way(WIDTHS, (True, True, True, False), CONTEXT, (1, 1)),
        Named("conv_norm_out", "out.0", ("final", "norm"), shape=("width0",), bias=True),
        Named("conv_out", "out.2", ("final",), shape=("output", "width0", 3, 3), bias=True),
    )
    # A ControlNet has no way out, distilled ones fewer blocks, later ones a second embedder.
    signatures = tuple(
        Signature(
            layout,
            has={
                f"{first}.weight": (None, None, 3, 3),
                f"{last}.weight": (None, None, 3, 3),
                f"{deepest}.weight": (None, None, 3, 3),
                f"{place}.transformer_blocks.0.attn2.to_k.weight": (None, CONTEXT),
                f"{place}.proj_in.weight": (None, None, 1, 1),
            },
            lacks={f"{embedder}.weight": None},
        )
        for layout, first, last, deepest, place, embedder in (
            ("comfyui", "input_blocks.0.0", "out.2", "output_blocks.2.1.conv", "input_blocks.2.1", "label_emb.0.0"),
            (
                *("diffusers", "conv_in", "conv_out", "up_blocks.0.upsamplers.0.conv"),
                *("down_blocks.0.attentions.1", "add_embedding.linear_1"),
            ),
        )
    )
    variants = (
        Variant("inpainting", {"conv_in.weight": (None, 9, 3, 3)}),
        Variant("InstructPix2Pix", {"conv_in.weight": (None, 8, 3, 3)}),
    )
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        **{f"width{level}": (f"down_blocks.{level}.resnets.0.norm2.weight", 0) for level in range(3)},
        "input": ("conv_in.weight", 1),
        "output": ("conv_out.bias", 0),
    }
    # ComfyUI reads the context's width off its columns, of which nvfp4 stores half as many.
    unquantised = frozenset({"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"})
    presets = block_weights(12)
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

    def config(self, anatomy: Anatomy) -> dict[str, Any] | None:
        """The unet/config.json of a model; None where tensors that show a size are missing."""
        sizes = self.measured({name: part.shape for name, part in anatomy.parts.items()})
        if not sizes or any(sizes[width] % HEADS for width in WIDTHS):
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
