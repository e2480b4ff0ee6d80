"""SDXL and Stable Diffusion 1 as the oracles are asked for them; test_sdxl.py and test_sd15.py have their LoRAs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from mergetool.arch.families.sd15 import SD15 as SD15_UNET
from mergetool.arch.families.sdxl import SDXL_UNET
from mergetool.arch.families.unet import UNet
from mergetool.arch.table import BLOCK
from tests import sdxl
from tests.oracles.case import Case, Tensors

SD15_CONFIG: Mapping[str, Any] = {
    "sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 768, "attention_head_dim": 8,
    "layers_per_block": 2,
}  # fmt: skip
"""What unet/config.json of the published model has beside diffusers' defaults."""


def sizes(family: UNet, widths: tuple[int, ...], depth: Callable[[str], int] = lambda stack: 1) -> Mapping[str, int]:
    """The sizes of a UNet of so many channels at each resolution, with so many transformer blocks in each place."""
    paths = (spot.path for spot in family.table.spots if BLOCK in spot.path)
    stacks = dict.fromkeys(".".join(path[: path.index(BLOCK)]) for path in paths)
    channels = {f"width{level}": width for level, width in enumerate(widths)}
    return family.derived({**channels, "input": 4, "output": 4, **{stack: depth(stack) for stack in stacks}})


def converted(config: Mapping[str, Any], tensors: Tensors) -> Tensors:
    """diffusers' converter, which looks for the prefix of a whole checkpoint."""
    return convert_ldm_unet_checkpoint({sdxl.UNET + name: tensor for name, tensor in tensors.items()}, dict(config))


SMALL_SDXL = {**sdxl.SMALL, "transformer_layers_per_block": [1, 1, 1]}
SMALL_SD15 = {**SD15_CONFIG, "block_out_channels": [32, 64, 128, 128]}
SDXL = Case(
    family=SDXL_UNET,
    small=sizes(SDXL_UNET, (32, 64, 128)),
    published={"base": sizes(SDXL_UNET, (320, 640, 1280), lambda stack: 2 if "blocks.1." in stack else 10)},
    configs={"base": "SDXL"},
    pipeline="StableDiffusionXLPipeline",
    model="UNet2DConditionModel",
    config=SMALL_SDXL,
    matrices=204,
    dimensions=(2, 4),
    renamed=True,
    converter=partial(converted, {**sdxl.PUBLISHED, "layers_per_block": 2}),
    stack="attentions.",
    kept=("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",),
)
SD15 = Case(
    family=SD15_UNET,
    small=sizes(SD15_UNET, (32, 64, 128)),
    published={"1.5": sizes(SD15_UNET, (320, 640, 1280))},
    configs={"1.5": "SD15"},
    pipeline="StableDiffusionPipeline",
    model="UNet2DConditionModel",
    config=SMALL_SD15,
    matrices=282,
    dimensions=(2, 4),
    renamed=True,
    converter=partial(converted, SD15_CONFIG),
    stack="attentions.",
    kept=("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",),
)
