"""LoRA key formats: how a low-rank difference is spelled for the programs that load it.

The default is the one spelling that diffusers and ComfyUI both load whole: a prefix of the family's before the diffusers
module name, split q/k/v, ``lora_A`` [rank, in] and ``lora_B`` [out, rank], no alpha (which both take as a scale of 1)
and no key of another kind, since a single ``.diff`` makes diffusers reject the file.
"""

from __future__ import annotations

from typing import Literal, get_args

KeyFormat = Literal["default", "diffusers", "comfyui", "kohya", "peft"]
KEY_FORMATS: tuple[KeyFormat, ...] = get_args(KeyFormat)

PREFIX = "diffusion_model."
CHECKPOINT = "model.diffusion_model."
"""What stands before a model's own names in whole checkpoints of families that are read under raw names, SDXL among them."""

DOWN = ".lora_A.weight"
UP = ".lora_B.weight"


def keys(module: str, prefix: str = PREFIX) -> tuple[str, str]:
    """The names of a module's factors behind a family's ``prefix``: down [rank, in] and up [out, rank].

    Example: ``layers.0.attention.to_q`` gives ``diffusion_model.layers.0.attention.to_q.lora_A.weight`` and
    ``diffusion_model.layers.0.attention.to_q.lora_B.weight``. `CHECKPOINT` before a module is left out, as loaders look
    modules up without it.
    """
    bare = without_prefix(module)
    return f"{prefix}{bare}{DOWN}", f"{prefix}{bare}{UP}"


def without_prefix(name: str) -> str:
    """A module's or tensor's name as it comes behind `PREFIX`."""
    return name.removeprefix(CHECKPOINT).removeprefix(PREFIX)
