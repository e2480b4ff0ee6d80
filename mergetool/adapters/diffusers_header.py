"""The header entry with a LoRA's ranks and scales, which every diffusers release reads.

Its own ``save_lora_weights`` writes it so.

Without it releases before 0.40 give every module the alpha of the first module's rank, so that a LoRA of mixed ranks is loaded at scales
of rank / rank instead of 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from functools import lru_cache

from mergetool.adapters.alphas import HEADER
from mergetool.adapters.diffusers_loaders import LOADERS
from mergetool.adapters.in_diffusers import Rejected
from mergetool.adapters.keys import Spelled, is_of_text_encoder, take_apart
from mergetool.adapters.origin import families_of, is_lookalike
from mergetool.arch import encoders
from mergetool.arch.anatomy import Lookalike
from mergetool.arch.families import FAMILIES

OWN = {f"{family.component}." for family in FAMILIES}
"""The prefixes of diffusers for the names of any family's transformer in a pipeline, or of its UNet."""


def header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The entry for a file of these tensors; empty where diffusers' names are unknown.

    It is empty for a file that is no LoRA as well. Those of a lookalike have others there.

    Text encoders that diffusers gives LoRAs are in it too, since it makes no layer of a component that a header leaves out. Its alphas are the ranks: diffusers multiplies ``.alpha`` tensors into the factors before it looks at the header.
    """
    component, other, downs, spelled = _downs(tuple(key for key in shapes if not is_of_text_encoder(key)))
    if not downs or (other and is_lookalike(other, spelled, shapes, {})):
        return {}
    ranks = {component: {module: shapes[down][0] for module, down in downs}}
    for key in filter(is_of_text_encoder, shapes):
        one = take_apart(key)
        found = encoders.in_diffusers(one.module) if isinstance(one, Spelled) and one.role == "down" else None
        if found:
            ranks.setdefault(found[0], {})[found[1]] = shapes[key][0]
    entries = {start + key: value for start, held in ranks.items() for key, value in _config(held).items()}
    return {HEADER: json.dumps(entries, sort_keys=True)}


def _config(ranks: Mapping[str, int]) -> dict[str, object]:
    """The arguments of PEFT's LoraConfig for the ranks of a component's modules."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {_pattern(module, ranks): value for module, value in ranks.items() if value != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
    }


def _pattern(module: str, modules: Collection[str]) -> str:
    """A module as PEFT finds it, by the end of its name: marked as a whole name where others end alike, as Flux's ``proj_out``."""
    return f"^{module}" if any(other.endswith(f".{module}") for other in modules) else module


@lru_cache(maxsize=4)
def _downs(
    keys: tuple[str, ...],
) -> tuple[str, Lookalike | None, tuple[tuple[str, str], ...], Mapping[str, Spelled]]:
    """Diffusers' name of the component, and its modules by their names there, each with the key of its ``down``.

    LoRAs of the component may have the same names. There is none where one of the modules is unknown, or is no LoRA,
    or where an alpha stands beside them that excludes a header.
    """
    spelled = {key: one for key in keys if isinstance(one := take_apart(key), Spelled)}
    if len(spelled) < len(keys) or any(".lokr_" in key or ".hada_" in key for key in keys):
        return "", None, (), {}
    prefixes = {one.prefix for one in spelled.values()}
    if len(prefixes) == 1 and prefixes <= OWN and all(one.role in ("up", "down") for one in spelled.values()):
        return (
            prefixes.pop(),
            None,
            tuple((one.module, key) for key, one in spelled.items() if one.role == "down"),
            spelled,
        )
    found = next(iter(families_of(spelled)), None)
    if found is None or found[0].loader is None:
        return "", None, (), {}
    loader = LOADERS[found[0].loader]
    if not loader.takes_header(keys):
        return "", None, (), {}
    known = {found[0].stored_name(part, "diffusers").removesuffix(".weight") for part in found[1]}
    try:
        modules = loader.modules(keys, loader.releases[-1])
    except Rejected:
        return "", None, (), {}
    if not modules.keys() <= known:
        return "", None, (), {}
    downs = ((name, key) for name, held in modules.items() for key in sorted(held) if spelled[key].role == "down")
    return f"{found[0].component}.", found[0].lookalike, tuple(downs), spelled
