"""The data of drawing with a family's models in a pipeline of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

GuidanceKind = Literal["cfg", "distilled", "none"]
"""Classifier-free guidance with a negative prompt, a scale that the model was taught to read, or neither."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The settings that suit a family's models where a user names none.

    ``pipeline`` is diffusers' class without the word; ``signs`` are entries of model_index.json and of the denoiser's config.json that a variant has.
    ``scale`` is that of ``guidance``; the pipeline's parameter for it is ``true_cfg_scale`` where it has one for CFG. Both sides of pictures are
    multiples of ``unit`` pixels; ``side`` is their length by default, None for the config's. ``source`` says where the figures are from.
    """

    pipeline: str
    steps: int
    guidance: GuidanceKind = "cfg"
    scale: float | None = None
    unit: int = 16
    side: int | None = None
    name: str = ""
    signs: Mapping[str, object] = field(default_factory=dict)
    source: str = "diffusers' pipeline"

    def fits(self, pipeline: str, config: Mapping[str, object]) -> bool:
        """Whether they are for a pipeline with these entries."""
        return self.pipeline == pipeline and all(
            name in config and config[name] == value for name, value in self.signs.items()
        )
