"""The sampler's words: samplers, schedulers, meanings of strength, presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

SamplerName = Literal["euler", "res_multistep", "dpmpp_2m_sde"]
Scheduler = Literal["simple", "normal", "sgm_uniform", "beta", "diffusers"]
StrengthMeaning = Literal["comfyui", "diffusers"]
Handoff = Literal["latent", "pixels"]
Precision = Literal["auto", "fp32", "bf16"]

SAMPLERS: tuple[SamplerName, ...] = get_args(SamplerName)
SCHEDULERS: tuple[Scheduler, ...] = get_args(Scheduler)
MEANINGS: tuple[StrengthMeaning, ...] = get_args(StrengthMeaning)
HANDOFFS: tuple[Handoff, ...] = get_args(Handoff)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MOST_STEPS = 10_000
SEEDS = 2**64
"""Seeds are 0 to one less, as in ComfyUI."""
MODEL_SHIFT = 3.0
"""The shift of a model without a scheduler beside it; ComfyUI takes it for every Z-Image."""


@dataclass(frozen=True, slots=True)
class StagePreset:
    """Settings of a stage that belong together.

    ``cfg`` counts as in ComfyUI; a ``shift`` of None is the model's own.
    """

    steps: int
    cfg: float
    shift: float | None = None
    sampler: SamplerName = "euler"
    scheduler: Scheduler = "simple"
    strength: float = 0.15


FIRST = StagePreset(steps=30, cfg=4.0)
SECOND = StagePreset(steps=4, cfg=1.0)
ACROSS = StagePreset(steps=10, cfg=1.0, strength=0.5)
"""A second stage over another family's picture, as guides have it: strength 0.4 to 0.6, 8 to 12 steps."""

WITHIN = StagePreset(steps=10, cfg=1.0, strength=0.3)
"""A second stage over a picture of its own family, at the strength that diffusers has for SDXL's."""

PRESETS: Mapping[str, StagePreset] = {
    "comfyui-base": StagePreset(25, 4.0, 3.0, "res_multistep", "simple"),
    "comfyui-turbo": StagePreset(8, 1.0, 3.0, "res_multistep", "simple"),
    "comfyui-refine": StagePreset(5, 1.0, 3.0, "dpmpp_2m_sde", "beta", 0.33),
}
"""The settings of ComfyUI's stock templates of Z-Image: image_z_image, image_z_image_turbo, utility_z_image_turbo_2k_upscaler."""
