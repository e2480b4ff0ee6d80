"""Chroma as the oracles are asked for it, and its LoRAs in every spelling that is met in the field, each with the change it means in float64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from diffusers.loaders.single_file_utils import convert_chroma_transformer_checkpoint_to_diffusers

from mergetool.arch.families.chroma import APPROXIMATOR, CHROMA, HD
from tests.adapters import flux
from tests.adapters.flux import DIM, MLP, written, xlabs
from tests.adapters.spellings import DOWN, UP
from tests.oracles.case import Case

INNER = 64
SMALL: Mapping[str, int] = {
    "dim": DIM, "head": 128, "hidden": MLP, "both": DIM + MLP, "patch_in": 64, "patch_out": 64, "context": 96, "inner": INNER, "index": 64,
    f"{APPROXIMATOR}.layers": 2, f"{APPROXIMATOR}.norms": 2, "transformer_blocks": 1, "single_transformer_blocks": 2,
}  # fmt: skip
"""Two heads of 128 channels tell rows from columns."""
CONFIG = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 96,
    "approximator_hidden_dim": INNER, "approximator_layers": 2,
}  # fmt: skip
"""The same model as a config of diffusers."""


def unmodulated(modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {
        name: shape for name, shape in modules.items() if not any(word in name for word in ("norm", "mod", "adaLN"))
    }


BLOCKS = unmodulated(flux.BLOCKS)
THEIRS = unmodulated(flux.THEIRS)
"""Some of diffusers' modules, with shapes."""
NATIVE = unmodulated(flux.NATIVE)
NATIVE_BLOCKS = unmodulated(flux.NATIVE_BLOCKS)
THEIR_APPROXIMATOR = {f"{APPROXIMATOR}.layers.1.linear_1": (INNER, INNER), f"{APPROXIMATOR}.out_proj": (DIM, INNER)}
OUR_APPROXIMATOR = {f"{APPROXIMATOR}.layers.1.in_layer": (INNER, INNER), f"{APPROXIMATOR}.out_proj": (DIM, INNER)}


def meaning(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    """Which parameters of diffusers a module's change is."""
    if module.startswith(APPROXIMATOR):
        return {f"{module.replace('in_layer', 'linear_1')}.weight": change}
    return {f"{module}.weight": change} if module in THEIRS else flux.by_diffusers(module, change)


made = partial(written, meaning=meaning)

CASE = Case(
    family=CHROMA,
    small=SMALL,
    published={"HD": HD},
    configs={"HD": "Chroma"},
    pipeline="ChromaPipeline",
    model="ChromaTransformer2DModel",
    config=CONFIG,
    matrices=12 + 2 * 5 + (2 + 2 * 2) + 3,
    unmapped=(APPROXIMATOR,),
    converter=convert_chroma_transformer_checkpoint_to_diffusers,
    converted=("diffusers", "ai-toolkit"),
    spellings={
        "diffusers": lambda: made("transformer.", THEIRS),
        "diffusers, with the approximator": lambda: made("transformer.", {**THEIRS, **THEIR_APPROXIMATOR}),
        "diffusers, alphas": lambda: made("transformer.", THEIRS, alpha=2.0),
        "diffusers, down and up": lambda: made("transformer.", THEIRS, DOWN, UP),
        "bare diffusers": lambda: made("", THEIRS),
        "PEFT": lambda: made("base_model.model.", THEIRS),
        "OneTrainer, attention": lambda: made("lora_transformer_", flux.ATTENTION, DOWN, UP, alpha=2.0, flat=True),
        "LyCORIS": lambda: made("lycoris_", THEIRS, DOWN, UP, alpha=2.0, flat=True),
        "ai-toolkit": lambda: made("diffusion_model.", NATIVE),
        "ai-toolkit, with the approximator": lambda: made("diffusion_model.", {**NATIVE, **OUR_APPROXIMATOR}),
        "ComfyUI": lambda: made("diffusion_model.", NATIVE_BLOCKS, DOWN, UP, alpha=2.0),
        "bare native": lambda: made("", NATIVE),
        "sd-scripts": lambda: made("lora_unet_", NATIVE_BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "underscored diffusers": lambda: made("lora_unet_", BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "xlabs": xlabs,
        "LoKr": flux.lokr,
    },
)  # fmt: skip
