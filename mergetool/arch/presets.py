"""Named settings of ``multipliers``, by family. Each says exactly which groups get which multiplier, and nothing of how it looks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """``preset:NAME``: the ``settings`` it stands for, each as ``multipliers`` takes it, in order."""

    name: str
    settings: tuple[str, ...]


# ``*`` is every tensor, embedders, pad tokens and final layer included; a later setting wins.
Z_IMAGE = (
    Preset("refiners-kept", ("refiner=0",)),
    Preset("layers-only", ("*=0", "layers=1")),
    Preset("attention-only", ("*=0", "layers.attention=1")),
    Preset("ffn-only", ("*=0", "layers.ffn=1")),
    Preset("early-layers", ("*=0", "layers=linear(1,0)")),
    Preset("late-layers", ("*=0", "layers=linear(0,1)")),
)
