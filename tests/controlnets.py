"""Small ControlNets for tests, with the tensors of diffusers' class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from mergetool.arch.families.controlnet import SD15_CONTROLNET, SDXL_CONTROLNET
from mergetool.arch.known import KnownFamily
from tests import sdxl

SDXL: Mapping[str, Any] = {
    key: value for key, value in sdxl.SMALL.items() if key not in ("sample_size", "up_block_types")
}
SD15: Mapping[str, Any] = {
    "block_out_channels": [32, 64, 128, 128],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
KINDS: Mapping[str, tuple[KnownFamily, Mapping[str, Any]]] = {
    "SDXL": (SDXL_CONTROLNET, SDXL),
    "SD1.5": (SD15_CONTROLNET, SD15),
}


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of diffusers' class."""
    return sdxl.shapes(config, name="ControlNetModel", layout="own")


def values(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights by their names in diffusers: multiples of 1/64 below 1, of which float32 holds every sum of a few."""
    generator = torch.Generator().manual_seed(seed)
    found = shapes(KINDS[kind][1])
    return {name: torch.randint(-63, 64, shape, generator=generator) / 64 for name, shape in found.items()}
