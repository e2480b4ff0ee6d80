"""The spellings of LoRA keys: prefix, module name and suffix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from mergetool.adapters.formats import DOTTED, FLAT
from mergetool.arch import Family, encoders
from mergetool.arch.lora_keys import ending
from mergetool.arch.prefixes import INSERTED

_TEXT_ENCODER = re.compile(
    r"(?:base_model\.model\.)?(?:lora_te\d?_|lycoris_te\d?_|lora_te\d?\.|te\d?\.|text_encoders?(?:_\d)?\.|text_model\.|clip_[lgh]\."
    r"|conditioner\.embedders\.|cond_stage_model\.|lora_prior_te_"
    r"|bundle_emb\.)"  # OneTrainer's embeddings
)
_XLABS = re.compile(
    r"(double_blocks\.\d+)\.processor\.(qkv|proj)_lora([12])|(single_blocks\.\d+)\.processor\.(qkv|proj)_lora"
)


@dataclass(frozen=True, slots=True)
class Spelled:
    """A key taken apart: prefix, module as spelled, suffix, kind and role.

    The kind is that of the adapter, the role that of the tensor; it is None where the kind is known and not read.
    """

    prefix: str
    module: str
    suffix: str
    role: str | None
    kind: str = ""

    @property
    def is_flat(self) -> bool:
        """Whether the module's dots became underscores."""
        return self.prefix.startswith(FLAT)


def take_apart(key: str) -> Spelled | str:
    """The pieces of a LoRA key, or in words why it is none."""
    found = ending(key)
    if found is None:
        return "not a LoRA key"
    stem = key.removesuffix(found.suffix)
    suffix, role = found.suffix, found.role
    if found.kind == "xlabs LoRA":
        stem, suffix = _xlabs(key), re.sub(r".*(?=\.(?:down|up)\b)", "", found.suffix)
        role = role if stem else None
        stem = stem or key.removesuffix(found.suffix)
    prefix, module = _without_prefixes(stem)
    return Spelled(prefix, module, suffix, role, found.kind) if module else "a key without a module"


def is_of_text_encoder(key: str) -> bool:
    """Whether ``key`` changes a text encoder, as far as names tell."""
    return _TEXT_ENCODER.match(key) is not None


def _xlabs(key: str) -> str:
    """The module of the BFL layout that an xlabs processor changes."""
    found = _XLABS.match(_without_prefixes(key)[1])
    if found is None:
        return ""
    if found[4]:
        return f"{found[4]}.{'linear2' if found[5] == 'proj' else 'linear1_qkv'}"
    return f"{found[1]}.{'img' if found[3] == '1' else 'txt'}_attn.{found[2]}"


def _without_prefixes(stem: str) -> tuple[str, str]:
    """Split a name into its known prefixes and the module."""
    prefix, module = "", ".".join(stem.split(".")[:1] + [part for part in stem.split(".")[1:] if part not in INSERTED])
    while True:
        flat = next((start for start in FLAT if module.startswith(start)), None)
        if flat is not None:
            bare = module.removeprefix(flat).lstrip("_")
            return prefix + module[: len(module) - len(bare)], bare
        first, dot, rest = module.partition(".")
        if not dot or first not in DOTTED:
            return prefix, module
        prefix, module = f"{prefix}{first}.", rest


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
            for stored, together in family.held(names, layout).items():
                self._dotted.setdefault(_module(stored), together)
        for alias, together in family.aliases(names).items():
            self._dotted.setdefault(alias, together)
        for module, held in encoders.lora_names(names, family.encoders).items():
            self._dotted.setdefault(module, held)
        for module, held in list(self._dotted.items()):  # raw names of a model may have the prefixes that keys have
            self._dotted.setdefault(_without_prefixes(module)[1], held)
        self._flat: dict[str, tuple[str, ...] | None] = {}
        for module, held in self._dotted.items():
            flat = module.replace(".", "_")
            self._flat[flat] = held if self._flat.get(flat, held) == held else None

    def find(self, spelled: Spelled) -> tuple[str, ...]:
        """The parts of a key's module. Empty where the model has none, or two of that name without dots."""
        if not spelled.is_flat:
            return self._dotted.get(spelled.module, ())
        return next((held for name in _flat_names(spelled.module) if (held := self._flat.get(name))), ())

    def bias(self, weight: str) -> str | None:
        """The bias beside a weight, where there is one."""
        name = weight.removesuffix(".weight") + ".bias"
        return name if self._dotted.get(name) else None


def _flat_names(module: str) -> Iterator[str]:
    """A module without dots, and without each of the prefixes that may have lost theirs with it."""
    yield module
    for start in (*(f"{component}_" for component in sorted(DOTTED)), *FLAT):
        if module.startswith(start) and not module.startswith("transformer_blocks_"):  # a name of several families
            yield from _flat_names(module.removeprefix(start).lstrip("_"))


def _module(part: str) -> str:
    return part.removesuffix(".weight") if part.endswith(".weight") else part.removesuffix(".scale")


def naming(spelled: Mapping[str, Spelled]) -> str:
    """The dialect of a file in words: its prefixes and the ends of its keys. They are as spelled."""
    prefixes = dict.fromkeys(one.prefix or "bare" for one in spelled.values())
    suffixes = dict.fromkeys(one.suffix for one in spelled.values() if one.role not in ("alpha", "dora_scale"))
    return f"{' and '.join(prefixes)} ({', '.join(sorted(suffixes))})"
