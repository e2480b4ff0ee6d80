"""LoRA key formats: how a low-rank difference is spelled for the programs that load it.

The default is the one spelling that diffusers and ComfyUI both load whole: ``diffusion_model.`` before the diffusers
module name, split q/k/v, ``lora_A`` [rank, in] and ``lora_B`` [out, rank], no alpha (which both take as a scale of 1)
and no key of another kind, since a single ``.diff`` makes diffusers reject the file.
"""

from __future__ import annotations

from collections.abc import Iterable

from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError

PREFIX = "diffusion_model."
CHECKPOINT = "model.diffusion_model."
"""What stands before a model's own names in whole checkpoints of families that are read under raw names, SDXL among them."""

DOWN = ".lora_A.weight"
UP = ".lora_B.weight"


def read_pairs(names: Iterable[str], *, source: str) -> dict[str, tuple[str, str]]:
    """Module -> the names of its down and up factors, for a file whose keys are spelled as ``keys`` spells them.

    Raises DataError for any other key: another dialect, of which a part would be left out in silence.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        for leaf in (DOWN, UP):
            if name.startswith(PREFIX) and name.endswith(leaf):
                found.setdefault(name.removeprefix(PREFIX).removesuffix(leaf), {})[leaf] = name
                break
        else:
            raise DataError(
                f'"{source}" has the key {quoted(name)}, which is not of the LoRA format that this version reads '
                f"({PREFIX}MODULE{DOWN} and {UP}); convert it first."
            )
    for module, pair in found.items():
        if len(pair) == 1:
            raise DataError(f'"{source}" has only one factor of {quoted(module)}; the file is damaged, get it again.')
    if not found:
        raise DataError(f'"{source}" holds no tensors; it is no LoRA.')
    return {module: (pair[DOWN], pair[UP]) for module, pair in found.items()}


def keys(module: str) -> tuple[str, str]:
    """The names of a module's factors: down [rank, in] and up [out, rank].

    Example: ``layers.0.attention.to_q`` gives ``diffusion_model.layers.0.attention.to_q.lora_A.weight`` and
    ``diffusion_model.layers.0.attention.to_q.lora_B.weight``. `CHECKPOINT` before a module is left out, as loaders look
    modules up without it.
    """
    bare = without_prefix(module)
    return f"{PREFIX}{bare}{DOWN}", f"{PREFIX}{bare}{UP}"


def without_prefix(name: str) -> str:
    """A module's or tensor's name as it comes behind `PREFIX`."""
    return name.removeprefix(CHECKPOINT).removeprefix(PREFIX)
