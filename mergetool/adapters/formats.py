"""The table of formats for writing LoRAs, and the prefixes of module names.

What ends a key is in `arch.lora_keys`, which tells a LoRA from a model as well; whose names a family's modules have is the family's (`lora_prefix`,
`flat_layout`, `in_comfyui`). A new format is a row of `FORMATS`, and a row of each of the other two where it brings an end or a prefix that no other has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mergetool.adapters.adapter import ChangeKind
from mergetool.arch import encoders
from mergetool.arch.anatomy import Family
from mergetool.arch.prefixes import INSERTED, WRAPPERS

KeyFormat = Literal["default", "diffusers", "comfyui", "kohya", "peft"]
KEY_FORMATS: tuple[KeyFormat, ...] = get_args(KeyFormat)

DOTTED = WRAPPERS | INSERTED | {"base_model", "lora_unet"}
"""Components that programs put before a module's dotted name; several may stand before each other, or the same one twice."""
FLAT = ("lora_unet_", "lycoris_", "lora_transformer_")
"""The prefixes of a name whose dots became underscores. VideoX-Fun writes one more underscore: an empty name of the root."""

_CHECKPOINT = "model.diffusion_model."
"""The prefixes of a model's own names in whole checkpoints of families that are read under raw names."""

_PRODUCTS: frozenset[ChangeKind] = frozenset({"lora", "loha", "lokr"})


@dataclass(frozen=True, slots=True)
class LoraFormat:
    """The spelling of a module: the text before and behind its name, and the place of its alpha.

    Some formats cannot express everything.

    ``summary`` is one line for users. ``layout`` says whose names modules have, ComfyUI's with q, k and v as one; None for those that the trainers
    of the family write. ``flat`` writes underscores for dots. An ``alpha`` is written ``always``, ``where needed``: for a scale that cannot be
    folded exactly, never (``none``), or into the ``config`` of a folder. ``kinds`` are those beside two plain factors that it can carry, ``dora`` the end of
    a DoRA's magnitudes.

    Of a model whose names are in no table ``looks_up`` says whose names the format's program looks up, None where that is not one program; ``has_own_prefix``
    that files with this prefix are in this format already.
    """

    summary: str
    prefix: str
    down: str
    up: str
    layout: Literal["diffusers", "comfyui"] | None
    flat: bool = False
    alpha: Literal["none", "where needed", "always", "config"] = "always"
    kinds: frozenset[ChangeKind] = frozenset()
    dora: str | None = ".dora_scale"
    looks_up: Literal["diffusers", "comfyui"] | None = None
    has_own_prefix: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder with a config."""
        return self.alpha == "config"

    def carries(self, kind: ChangeKind, roles: frozenset[str]) -> bool:
        """Whether it can hold a module of that ``kind`` with tensors of these ``roles``."""
        if kind == "lora" and "mid" not in roles:
            return "dora_scale" not in roles or self.dora is not None
        return kind in self.kinds

    def module(self, name: str) -> str:
        """A module's name with its prefix; `bare` gives it as it comes."""
        return self.prefix + (name.replace(".", "_") if self.flat else name)

    def key(self, name: str, kind: ChangeKind, role: str) -> str:
        """The name of one tensor of a module."""
        return self.module(name) + self._ending(kind, role)

    def factors(self, name: str) -> tuple[str, str]:
        """The names of a module's factors: down [rank, in] and up [out, rank].

        Example: ``layers.0.attention.to_q`` gives ``diffusion_model.layers.0.attention.to_q.lora_A.weight`` and
        ``diffusion_model.layers.0.attention.to_q.lora_B.weight`` in the default format.
        """
        return self.key(name, "lora", "down"), self.key(name, "lora", "up")

    def _ending(self, kind: ChangeKind, role: str) -> str:
        if role == "alpha":
            return ".alpha"
        if kind == "lora":
            ends = {"down": self.down, "up": self.up, "mid": ".lora_mid.weight", "dora_scale": self.dora or ""}
            return ends.get(role, f".{role}")
        if role in ("diff", "diff_b", "set_weight", "dora_scale"):
            return f".{role}"
        return f".{'hada' if kind == 'loha' else 'lokr'}_{role}"

    def layout_of(self, family: Family) -> str:
        """The layout of ``family`` whose names it has."""
        layout = self.layout or family.flat_layout
        return layout if layout in family.layouts else family.layouts[0]


FORMATS: Mapping[KeyFormat, LoraFormat] = {
    # The one spelling that diffusers and ComfyUI both load whole: a prefix of the family's before the diffusers module name, no alpha (which both take as
    # a scale of 1) and no key of another kind, since a single ``.diff`` makes diffusers reject the file.
    "default": LoraFormat(
        "diffusion_model. and diffusers' names, lora_A and lora_B: for diffusers and ComfyUI",
        prefix="diffusion_model.",
        down=".lora_A.weight",
        up=".lora_B.weight",
        layout="diffusers",
        alpha="where needed",
        kinds=_PRODUCTS,
    ),
    "diffusers": LoraFormat(
        "transformer. and the same names; a scale is multiplied in",
        prefix="transformer.",
        down=".lora_A.weight",
        up=".lora_B.weight",
        layout="diffusers",
        alpha="none",
        dora=None,
        looks_up="diffusers",
    ),
    "comfyui": LoraFormat(
        "ComfyUI's own names, q, k and v as one; also carries whole differences (.diff) and weights (.set_weight)",
        prefix="diffusion_model.",
        down=".lora_down.weight",
        up=".lora_up.weight",
        layout="comfyui",
        kinds=_PRODUCTS | {"full", "whole"},
        looks_up="comfyui",
    ),
    "kohya": LoraFormat(
        "lora_unet_, underscores and alphas, as musubi-tuner has them: for diffusers since 0.39",
        prefix="lora_unet_",
        down=".lora_down.weight",
        up=".lora_up.weight",
        layout=None,
        flat=True,
        kinds=_PRODUCTS,
        looks_up="comfyui",
        has_own_prefix=True,
    ),
    "peft": LoraFormat(
        "a folder: adapter_model.safetensors and adapter_config.json",
        prefix="base_model.model.",
        down=".lora_A.weight",
        up=".lora_B.weight",
        layout="diffusers",
        alpha="config",
        dora=".lora_magnitude_vector",
        looks_up="diffusers",
        has_own_prefix=True,
    ),
}


def format_for(family: Family, key_format: KeyFormat = "default") -> LoraFormat:
    """A format as it is for LoRAs of ``family``."""
    chosen = FORMATS[key_format]
    if key_format == "diffusers":
        return replace(chosen, prefix=f"{family.component}.")
    if key_format != "default":
        return chosen
    if family.lora_prefix in FLAT:
        chosen = replace(FORMATS["kohya"], summary=chosen.summary)
    alpha = chosen.alpha if family.lora_alphas else "none"
    return replace(chosen, prefix=family.lora_prefix, alpha=alpha, layout=chosen.layout and family.lora_layout)


def factors_of(family: Family, part: str) -> tuple[str, str]:
    """The names of a part's factors in the default format: down and up.

    They stand under the part's own name where a tensor holds several (see `fused.joined`), a text encoder's under `encoders.lora_module`.

    Raises ValueError for what is no module's weight.
    """
    form, module = format_for(family), family.lora_module(part)
    layout = form.layout_of(family)
    if encoders.is_encoder(part):
        module = encoders.lora_module(part, family.encoders, flat=form.flat)
        return f"{module}{form.down}", f"{module}{form.up}"
    if len(family.pieces(part, layout)) == 1:
        module = family.stored_name(part, layout).removesuffix(".weight")
    return form.factors(bare(module))


def bare(name: str) -> str:
    """A name without the prefix of a checkpoint, as loaders look it up. It is of a module or tensor."""
    return name.removeprefix(_CHECKPOINT).removeprefix("diffusion_model.")


def module_name(parameter: str) -> str:
    """The module that a parameter is of, as LoRA files call it. A norm's ``scale`` is its weight."""
    name = bare(parameter)
    return next((name.removesuffix(leaf) for leaf in (".weight", ".bias", ".scale") if name.endswith(leaf)), name)


def carrying(kind: ChangeKind, roles: frozenset[str]) -> list[KeyFormat]:
    """The formats that can hold such a module."""
    return [name for name, form in FORMATS.items() if form.carries(kind, roles)]
