"""The spellings of LoRA keys: what stands before a module's name, what behind it, and how the module itself is written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mergetool.arch import Family
from mergetool.arch.z_image import Z_IMAGE, reference_shapes

# Longest first: ".lora_A.weight" is the end of no other, but ".diff" would be of a module called "x.diff".
SUFFIXES: tuple[tuple[str, str], ...] = tuple(
    sorted(
        (
            *((f".lora_{letter}{middle}{end}", role)
              for letter, role in (("A", "down"), ("B", "up"))
              for middle in ("", ".default") for end in ("", ".weight")),
            *((f"{lora}.{name}{end}", role)
              for lora in (".lora", "_lora", ".lora_linear_layer")
              for name, role in (("down", "down"), ("up", "up"), ("mid", "mid")) for end in ("", ".weight")),
            *((f".lora_{role}{end}", role) for role in ("down", "up", "mid") for end in ("", ".weight")),
            *((f".lora_magnitude_vector{end}", "dora_scale") for end in ("", ".weight", ".default", ".default.weight")),
            *((f".hada_{role}", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            *((f".lokr_{role}", role) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
            (".alpha", "alpha"),
            (".dora_scale", "dora_scale"),
            (".diff", "diff"),
            (".diff_b", "diff_b"),
        ),
        key=lambda entry: -len(entry[0]),
    )
)  # fmt: skip
UNREAD = {
    ".set_weight": "a whole weight instead of a change", ".reshape_weight": "a change of the weight's shape",
    ".w_norm": "a norm of the whole weight", ".b_norm": "a norm of a bias",
    ".oft_blocks": "OFT", ".oft_diag": "OFT", ".boft_blocks": "BOFT",
    ".a1.weight": "GLoRA", ".a2.weight": "GLoRA", ".b1.weight": "GLoRA", ".b2.weight": "GLoRA",
}  # fmt: skip
"""Ends of keys whose meaning is known and not read."""

DOTTED = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
FLAT = ("lora_unet_", "lycoris_", "lora_transformer_")


@dataclass(frozen=True, slots=True)
class Spelled:
    """A key taken apart: prefix, module as spelled, suffix, and the role that the suffix names."""

    prefix: str
    module: str
    suffix: str
    role: str


def take_apart(key: str) -> Spelled | str:
    """The pieces of a LoRA key, or in words why it is none."""
    found = next((entry for entry in SUFFIXES if key.endswith(entry[0])), None)
    if found is None:
        known = next((what for end, what in UNREAD.items() if key.endswith(end)), None)
        return f"{known}, which is not read" if known else "not a LoRA key"
    suffix, role = found
    module, prefix, again = key.removesuffix(suffix), "", True
    while again:  # base_model.model. may stand before transformer.
        again = False
        for start in DOTTED:
            if module.startswith(start) and (not prefix or prefix == "base_model.model."):
                prefix, module, again = prefix + start, module.removeprefix(start), True
                break
    if not prefix:
        prefix = next((start for start in FLAT if module.startswith(start)), "")
        module = module.removeprefix(prefix)
    return Spelled(prefix, module, suffix, role) if module else "a key without a module"


class Modules:
    """The modules of a model under every name that LoRA files give them.

    ``parts`` are the canonical names of its parameters. A module's value is the parts it holds in row order: one, or q, k and v of a
    fused one.
    """

    def __init__(self, family: Family, parts: Iterable[str]) -> None:
        self._dotted: dict[str, tuple[str, ...]] = {}
        names = list(parts)
        for part in names:
            self._dotted[_module(part)] = (part,)
        for layout in family.layouts:
            fused: dict[str, list[str]] = {}
            for part in sorted(names, key=family.order):
                fused.setdefault(family.stored_name(part, layout), []).append(part)
            for stored, together in fused.items():
                self._dotted.setdefault(_module(stored), tuple(together))
        for module, held in list(self._dotted.items()):  # a whole checkpoint's raw names, which LoRA files shorten
            for start in ("model.diffusion_model.", "diffusion_model."):
                if module.startswith(start):
                    self._dotted.setdefault(module.removeprefix(start), held)
        self._flat: dict[str, tuple[str, ...] | None] = {}
        for module, held in self._dotted.items():
            flat = module.replace(".", "_")
            self._flat[flat] = held if self._flat.get(flat, held) == held else None

    def find(self, spelled: Spelled) -> tuple[str, ...]:
        """The parts of a key's module; empty where the model has none, or two of that name without dots."""
        if spelled.prefix in FLAT:
            return self._flat.get(spelled.module) or ()
        return self._dotted.get(spelled.module, ())

    def bias(self, weight: str) -> str | None:
        """The bias beside a weight, where there is one."""
        name = weight.removesuffix(".weight") + ".bias"
        return name if self._dotted.get(name) else None


def _module(part: str) -> str:
    return part.removesuffix(".weight")


def z_image_parts(keys: Iterable[str]) -> list[str] | None:
    """The parts of a Z-Image as deep as the modules of ``keys`` go; None where no key is of one."""
    spelled = [found for found in map(take_apart, keys) if isinstance(found, Spelled)]
    depth = max((_depth(one) for one in spelled), default=0)
    parts = list(reference_shapes({"n_layers": depth + 1, "n_refiner_layers": depth + 1}, "diffusers"))
    modules = Modules(Z_IMAGE, parts)
    matched = sum(bool(modules.find(one)) for one in spelled)
    return parts if matched * 2 > len(spelled) else None


def _depth(spelled: Spelled) -> int:
    flat = spelled.module.replace(".", "_").split("_")
    numbers = [int(word) for word in flat if word.isascii() and word.isdigit() and len(word) < 4]
    return numbers[0] if numbers else 0


def naming(spelled: Mapping[str, Spelled]) -> str:
    """The dialect of a file in words: its prefixes and the ends of its keys, as they are spelled."""
    prefixes = dict.fromkeys(one.prefix or "bare" for one in spelled.values())
    suffixes = dict.fromkeys(one.suffix for one in spelled.values() if one.role not in ("alpha", "dora_scale"))
    return f"{' and '.join(prefixes)} ({', '.join(sorted(suffixes))})"
