"""How the formats that are written spell a module: what stands before and behind its name, and where its alpha goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mergetool.adapters.adapter import Kind
from mergetool.adapters.dialects import KeyFormat
from mergetool.arch import Family


@dataclass(frozen=True, slots=True)
class Spelling:
    """One format.

    ``flat`` writes underscores for dots, ``fused`` ComfyUI's own names, q, k and v as one. An ``alpha`` is written ``always``, ``where
    needed``: for a scale that cannot be folded exactly, never (``none``), or into the ``config``. ``kinds`` are those beside two plain factors that
    it can carry.
    """

    prefix: str
    down: str
    up: str
    flat: bool = False
    fused: bool = False
    alpha: Literal["none", "where needed", "always", "config"] = "always"
    kinds: frozenset[Kind] = frozenset()
    dora: str | None = ".dora_scale"

    def module(self, name: str) -> str:
        """A module's name with what stands before it."""
        return self.prefix + (name.replace(".", "_") if self.flat else name)

    def layout(self, family: Family) -> str:
        """The layout whose names it has."""
        layout = "comfyui" if self.fused else "diffusers"
        return layout if layout in family.layouts else family.layouts[0]

    def ending(self, kind: Kind, role: str) -> str:
        """What stands behind a module's name for one of its tensors."""
        if kind == "lora":
            ends = {"down": self.down, "up": self.up, "mid": ".lora_mid.weight", "dora_scale": self.dora or ""}
            return ends[role]
        if role in ("diff", "diff_b", "dora_scale"):
            return f".{role}"
        return f".{'hada' if kind == 'loha' else 'lokr'}_{role}"


SPELLINGS: Mapping[KeyFormat, Spelling] = {
    "default": Spelling(
        "diffusion_model.",
        ".lora_A.weight",
        ".lora_B.weight",
        alpha="where needed",
        kinds=frozenset({"lora", "loha", "lokr"}),
    ),
    "diffusers": Spelling("transformer.", ".lora_A.weight", ".lora_B.weight", alpha="none", dora=None),
    "comfyui": Spelling(
        "diffusion_model.",
        ".lora_down.weight",
        ".lora_up.weight",
        fused=True,
        kinds=frozenset({"lora", "loha", "lokr", "full"}),
    ),
    "kohya": Spelling(
        "lora_unet_", ".lora_down.weight", ".lora_up.weight", flat=True, kinds=frozenset({"lora", "loha", "lokr"})
    ),
    "peft": Spelling(
        "base_model.model.", ".lora_A.weight", ".lora_B.weight", alpha="config", dora=".lora_magnitude_vector"
    ),
}


def spelling_for(family: Family, key_format: KeyFormat) -> Spelling:
    """A format as it is for LoRAs of ``family``."""
    spelling = SPELLINGS[key_format]
    if spelling.flat:
        return replace(spelling, fused=family.flat_layout == "comfyui")
    return replace(spelling, prefix=family.lora_prefix) if key_format == "default" else spelling


def with_alphas_everywhere(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LoRAs of the default format, as they are if none of them needs an ``.alpha`` or has a ``.lora_mid``, else all with an alpha.

    Then the factors' names end in ``.lora_down.weight`` and ``.lora_up.weight``: diffusers 0.36 reads alphas only beside these, and
    only where every module has one, and ComfyUI reads a ``.lora_mid.weight`` only beside these. Later releases read both.
    """
    default = SPELLINGS["default"]
    if not any(name.endswith((".alpha", ".lora_mid.weight")) for name in tensors):
        return dict(tensors)
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(default.down)
        if name.endswith(default.down) and f"{module}.alpha" not in tensors:
            found[f"{module}.alpha"] = torch.tensor(float(len(tensor)))
        new = name.replace(default.down, ".lora_down.weight").replace(default.up, ".lora_up.weight")
        found[new] = tensor
    return found
