"""LoRA key formats: how a low-rank difference is spelled for the programs that load it.

The default is the one spelling that diffusers and ComfyUI both load whole: ``diffusion_model.`` before the diffusers
module name, split q/k/v, ``lora_A`` [rank, in] and ``lora_B`` [out, rank], no alpha (which both take as a scale of 1)
and no key of another kind, since a single ``.diff`` makes diffusers reject the file.
"""

from __future__ import annotations

PREFIX = "diffusion_model."
DOWN = ".lora_A.weight"
UP = ".lora_B.weight"


def keys(module: str) -> tuple[str, str]:
    """The names of a module's factors: down [rank, in] and up [out, rank].

    Example: ``layers.0.attention.to_q`` gives ``diffusion_model.layers.0.attention.to_q.lora_A.weight`` and
    ``diffusion_model.layers.0.attention.to_q.lora_B.weight``.
    """
    return f"{PREFIX}{module}{DOWN}", f"{PREFIX}{module}{UP}"
