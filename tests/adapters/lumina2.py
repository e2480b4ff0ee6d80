"""Lumina-Image 2 as the oracles are asked for it, and its LoRAs in every spelling that is met in the field, each with the change it means in float64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

from mergetool.arch.families.lumina2 import LUMINA2, PUBLISHED
from tests.adapters.flux import written
from tests.adapters.spellings import DOWN, UP
from tests.oracles.case import Case

SMALL: Mapping[str, int] = {
    **PUBLISHED, "dim": 192, "head": 32, "keys": 64, "hidden": 768, "modulation": 192, "caption": 96, "layers": 2,
}  # fmt: skip
"""A twelfth of the width: six heads have queries and two have keys."""
CONFIG = {
    "hidden_size": 192, "num_layers": 2, "num_refiner_layers": 2, "num_attention_heads": 6, "num_kv_heads": 2, "axes_dim_rope": [8, 12, 12],
    "cap_feat_dim": 96,
}  # fmt: skip
"""The same model as a config of diffusers."""

DIM, KEYS, MLP = SMALL["dim"], SMALL["keys"], SMALL["hidden"]
BLOCK = {
    "attention.qkv": (DIM + 2 * KEYS, DIM),
    "attention.out": (DIM, DIM),
    "feed_forward.w1": (MLP, DIM),
    "feed_forward.w2": (DIM, MLP),
    "feed_forward.w3": (MLP, DIM),
    "adaLN_modulation.1": (4 * DIM, DIM),
}
LAYERS = {f"layers.{i}.{name}": shape for i in range(2) for name, shape in BLOCK.items()}
"""What sd-scripts trains."""
NATIVE = {
    **LAYERS,
    "noise_refiner.1.attention.qkv": BLOCK["attention.qkv"],
    "context_refiner.0.feed_forward.w3": BLOCK["feed_forward.w3"],
    "cap_embedder.1": (DIM, 96),
    "final_layer.linear": (64, DIM),
}
_RENAMED = {
    "attention.out": "attn.to_out.0", "feed_forward.w1": "feed_forward.linear_1", "feed_forward.w2": "feed_forward.linear_2",
    "feed_forward.w3": "feed_forward.linear_3", "adaLN_modulation.1": "norm1.linear",
    "cap_embedder.1": "time_caption_embed.caption_embedder.1", "final_layer.linear": "norm_out.linear_2",
}  # fmt: skip


def by_diffusers(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    """A change of one of ComfyUI's modules as those of diffusers' parameters."""
    stack, number, inner = module.split(".", 2) if module.count(".") > 1 else ("", "", module)
    block = f"{stack}.{number}." if stack else ""
    if inner == "attention.qkv":
        rows = np.split(change, [DIM, DIM + KEYS])
        return {f"{block}attn.to_{letter}.weight": part for letter, part in zip("qkv", rows, strict=True)}
    return {f"{block}{_RENAMED[inner]}.weight": change}


def itself(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{module}.weight": change}


THEIRS = {
    **{f"layers.1.attn.to_{letter}": (DIM if letter == "q" else KEYS, DIM) for letter in "qkv"},
    "layers.0.attn.to_out.0": (DIM, DIM),
    "layers.1.feed_forward.linear_2": (DIM, MLP),
    "layers.0.norm1.linear": (4 * DIM, DIM),
    "noise_refiner.0.attn.to_v": (KEYS, DIM),
}
"""Some of diffusers' modules, with shapes."""
made, native = partial(written, meaning=itself), partial(written, meaning=by_diffusers)

CASE = Case(
    family=LUMINA2,
    small=SMALL,
    published={"Lumina-Image 2": PUBLISHED},
    configs={"Lumina-Image 2": "Lumina2"},
    pipeline="Lumina2Pipeline",
    model="Lumina2Transformer2DModel",
    config=CONFIG,
    matrices=2 * 8 + 2 * 7 + 2 * 8 + 4 + 2,
    converter=convert_lumina2_to_diffusers,
    converted=("native, down and up", "diffusers"),
    kept=("norm1.linear",),
    stack="layers.",
    has_one_width=True,
    spellings={
        "diffusers": lambda: made("transformer.", THEIRS),
        "diffusers, alphas": lambda: made("transformer.", THEIRS, alpha=2.0),
        "diffusers' names under diffusion_model": lambda: made("diffusion_model.", THEIRS),
        "PEFT": lambda: made("base_model.model.", THEIRS),
        "native": lambda: native("diffusion_model.", NATIVE),
        "native, down and up": lambda: native("diffusion_model.", NATIVE, DOWN, UP, alpha=2.0),
        "sd-scripts": lambda: native("lora_unet_", LAYERS, DOWN, UP, alpha=2.0, flat=True),
        "bare": lambda: native("", NATIVE),
    },
)
