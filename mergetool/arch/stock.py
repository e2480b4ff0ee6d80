"""The stock model that a file builds on, by its header, its metadata and its name.

Tensors decide first: a `Variant` leaves the stock models that have such a header. Words in metadata choose among these, then words in the file's name, which
anybody can write. A family's rows (`Family.stock`) say what its publishers trained from what; where they say nothing nothing is claimed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal

from mergetool.arch.anatomy import Anatomy, Family
from mergetool.arch.signs import Stock

Evidence = Literal["tensors", "metadata", "name"]
STATED = (
    *("modelspec.architecture", "modelspec.title", "ss_base_model_version", "ss_sd_model_name", "_name_or_path"),
    *("general.name", "general.basename", "general.finetune", "general.base_model.0.name"),
)
"""Keys of metadata, of a GGUF file and of config.json that name a model or its base."""
_GENERIC = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_lora_weights)[.-].*|transformer(_\d+)?|unet|snapshots|[0-9a-f]{40}",
    re.IGNORECASE,
)
_MOST_PARTS = 5


@dataclass(frozen=True, slots=True)
class Ancestor:
    """The stock models that a file can build on, of which it is one, and the evidence for it.

    ``label`` names them. They are ``listed`` where the family has rows for such a header.
    """

    models: tuple[Stock, ...]
    by: Evidence
    label: str
    listed: bool = True

    @property
    def told(self) -> str:
        """The same in words that follow a file's name."""
        return f"{self.label} by its {self.by}"


def ancestor_of(
    family: Family,
    anatomy: Anatomy | None,
    metadata: Mapping[str, str],
    source: str,
    config: Mapping[str, Any] | None = None,
) -> Ancestor | None:
    """Find the stock models that a model of ``family`` can build on.

    Without ``anatomy`` it is a LoRA for one. ``source`` is its path or address. None where nothing tells.
    """
    variant = None if anatomy is None else family.variant(anatomy, config)
    fitting = tuple(
        stock
        for stock in family.stock
        if anatomy is None or variant in stock.variants or not (variant or stock.variants)
    )
    stated = {**metadata, **{key: str(value) for key, value in (config or {}).items()}}
    for by, text in (("metadata", " ".join(stated.get(key, "")[:500] for key in STATED)), ("name", name_of(source))):
        chosen = _chosen(fitting, text)
        if chosen:
            names = dict.fromkeys(stock.name for stock in chosen)
            return Ancestor(chosen, "metadata" if by == "metadata" else "name", " or ".join(names))
    if variant is None:
        return None
    if not fitting:
        return Ancestor((Stock(variant, (variant,)),), "tensors", variant, listed=False)
    return Ancestor(fitting, "tensors", variant)


def _chosen(fitting: tuple[Stock, ...], text: str) -> tuple[Stock, ...]:
    """The first stock model with a word in ``text``, and others of the same words."""
    plain = re.sub(r"[_\s]+", "-", text.lower())
    first = next((stock for stock in fitting if any(re.search(word, plain) for word in stock.words)), None)
    return () if first is None else tuple(stock for stock in fitting if stock.words == first.words)


def name_of(source: str) -> str:
    """The end of a path, from the last name that somebody chose.

    Example: ``Wan2.2-T2V-A14B/transformer_2``.
    """
    taken: list[str] = []
    for part in reversed(PurePath(source).parts[-_MOST_PARTS:]):
        taken.insert(0, part)
        if not _GENERIC.fullmatch(part):
            break
    return "/".join(taken)


Kinship = Literal["same", "child", "extended", "parent", "strangers"]


def kinship(family: Family, x: Ancestor, y: Ancestor) -> Kinship:
    """Say how the stock models of two files stand to each other.

    They can be the same; x's was trained from y's, with tensors of its own ("extended") or without ("child"), or the other way round ("parent"); or neither is known to be.
    """
    if any(one.name == other.name for one in x.models for other in y.models):
        return "same"
    if any(other.name in _above(family, one) for one in x.models for other in y.models):
        alike = any(one.variants == other.variants for one in x.models for other in y.models)
        return "child" if alike else "extended"
    if any(one.name in _above(family, other) for one in x.models for other in y.models):
        return "parent"
    return "strangers"


def _above(family: Family, stock: Stock) -> set[str]:
    """All that a stock model was trained from, and what that was."""
    rows = {row.name: row for row in family.stock}
    found: set[str] = set()
    waiting = [*stock.of]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += rows[name].of
    return found
