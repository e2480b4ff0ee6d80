"""The families without a table of names: every tensor is a part under its own name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergetool.arch import control, encoders
from mergetool.arch.anatomy import Anatomy, Family, Part, natural_key
from mergetool.arch.prefixes import Names
from mergetool.arch.signs import Shapes, Signature, Variant
from mergetool.checkpoint.header import TensorInfo
from mergetool.errors import UsageError
from mergetool.quant.encoding import Encoding
from mergetool.quant.weights import side_tensors

_DERIVED = ("matrix", "norm", "bias", "attention", "ffn", "embedder", "refiner", "modulation")
# Words of components, as the classes of ComfyUI and diffusers call them: img_attn, attn1, self_attention; img_mlp, mlp_x, mlpC, ff_context, channelwise.
_ATTENTION = re.compile(r"(?:^|_)attn\d?$|(?:^|_)attention$")
_FFN = re.compile(
    r"(?:^|_)(?:mlp|ffn?|feed_?forward)(?:_[a-z]|[A-Z]|_context|_in)?$|^(?:shared_)?experts$|^channelwise$"
)
_ASIDE = {
    "embedder": re.compile(r"emb(?:ed|$|_)"),
    "refiner": re.compile(r"refiner"),
    "modulation": re.compile(r"modulat|(?i:ada_?ln)|scale_shift|(?:^|_)(?:mod|ada)(?:_[a-z]|[A-Z]{1,2})?$"),
}
"""The groups beside the main blocks: an embedder's MLP, a refiner's attention, a modulation of either."""


class Generic(Family):
    """Any architecture: tensors keep their names, and names and shapes give the groups.

    Groups: each top-level path component (``double_blocks``); ``matrix`` (two or more dimensions), ``norm`` (1-D ``weight`` or ``scale``), ``bias``;
    ``attention`` and ``ffn`` for tensors under a component of such a name (``img_attn``, ``mlp_x``); ``embedder``, ``refiner`` and ``modulation`` the same
    way. A refiner's attention is in both; an embedder's or a modulation's MLP is no feed-forward. A top-level component that is called like one of those
    is reached by a glob (``norm.*``).

    The option `quant` takes the matrices of ``attention`` and ``ffn`` that are in none of ``embedder``, ``refiner``, ``modulation``.
    """

    name = "generic"
    layouts = ("plain",)
    group_order = _DERIVED
    keeps_names = True
    caveat = "not known; the model merges under the names that its tensors have"
    precise = frozenset({"embedder", "refiner", "modulation"})
    attention: frozenset[str] = frozenset()  # other components that are attention, and feed-forward
    ffn: frozenset[str] = frozenset()

    def variant(self, anatomy: Anatomy, config: Mapping[str, Any] | None = None) -> str | None:
        """See `Family.variant`: a ControlNet's or an adapter's kind."""
        return control.kind_of(anatomy.parts)

    def groups(self, part: str, shape: tuple[int, ...]) -> frozenset[str]:
        """The derived groups of a part, and its top-level component when it has one."""
        beside = encoders.groups(part)
        if beside:
            return beside
        components = part.split(".")
        found = {group for group, word in _ASIDE.items() if any(map(word.search, components))}
        if len(components) > 1 and components[0] and components[0] not in _DERIVED:
            found.add(components[0])
        if len(shape) >= 2:
            found.add("matrix")
        elif len(shape) == 1 and components[-1] in ("weight", "scale"):
            found.add("norm")
        if components[-1] == "bias":
            found.add("bias")
        if found.isdisjoint({"embedder", "modulation"}):
            if not self.attention.isdisjoint(components) or any(map(_ATTENTION.search, components)):
                found.add("attention")
            if not self.ffn.isdisjoint(components) or any(map(_FFN.search, components)):
                found.add("ffn")
        return frozenset(found)

    def stored_name(self, part: str, layout: str) -> str:
        """The part's own name. Raises UsageError for a layout other than ``plain``."""
        self.check_layout(layout)
        return part

    def check_layout(self, layout: str) -> None:
        """Raise UsageError for a layout other than ``plain``. The names' meaning in another one is not known."""
        if layout not in self.layouts:
            raise UsageError(
                f'mergetool knows no layout "{layout}" of {self.name} models; it keeps the names that the '
                "file gives: leave `layout` out (`prefix` changes what stands before them)."
            )

    def order(self, part: str) -> tuple[object, ...]:
        """Natural order of names: ``blocks.2`` before ``blocks.10``."""
        return natural_key(part)


GENERIC = Generic()


class NamedFamily(Generic):
    """A generic model with a name: an architecture that is recognised, without a table.

    It is known by ``signs``, of which one fits, each in the layout of one program; ``variants`` are told as in a family with a table. ``attention`` and
    ``ffn`` are components of its own that are such. ``aside`` are those whose matrices are never quantised, beside what `Generic` keeps: they prepare the
    conditions of the main blocks. ``unquantised`` are single parts, which programs read a size off.
    """

    caveat = "known by name only: it merges under the names that its tensors have; its layouts and its LoRAs' names are not proved"

    def __init__(
        self,
        name: str,
        *signs: Signature,
        variants: tuple[Variant, ...] = (),
        attention: frozenset[str] = frozenset(),
        ffn: frozenset[str] = frozenset(),
        aside: frozenset[str] = frozenset(),
        unquantised: frozenset[str] = frozenset(),
    ) -> None:
        self.name = name
        self.signs = signs
        self.variants = variants
        self.attention, self.ffn = attention, ffn
        self.precise = Generic.precise | aside
        self.unquantised = unquantised

    def shows(self, shapes: Shapes) -> bool:
        """Whether ``shapes``, under the model's own names, are of this family, by one of its signs."""
        return any(sign.fits(shapes) for sign in self.signs)

    def variant(self, anatomy: Anatomy, config: Mapping[str, Any] | None = None) -> str | None:
        """See `Family.variant`: the first of ``variants`` that fits."""
        shapes = {name: part.shape for name, part in anatomy.parts.items()}
        return next((variant.name for variant in self.variants if variant.fits(shapes)), None)


def anatomy_of(
    names: Names,
    tensors: Mapping[str, TensorInfo],
    encodings: Mapping[str, Encoding],
    outside: Mapping[str, Part],
    family: Generic = GENERIC,
) -> Anatomy:
    """Make every tensor of the model a part of ``family``, under its own name. Markers and scales of quantised weights stay beside.

    ``tensors`` and ``encodings`` are under the model's own names too. A norm's ``scale`` is the part ``weight``: programs read either.
    """
    parts: dict[str, Part] = {}
    sides = side_tensors(names.own, encodings)
    for stored, name in names.own.items():
        if stored not in sides:
            part = _canonical(name, tensors)
            parts[part] = replace(Part.whole(stored, tensors[name], encodings.get(name)), name=part)
    return Anatomy(
        family, "plain", names.prefix, parts, outside, tuple(stored for stored in names.own if stored in sides)
    )


def _canonical(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The part's name: ``X.weight`` for the vector ``X.scale`` of a norm, which has no other weight."""
    module, dot, leaf = name.rpartition(".")
    if leaf != "scale" or not dot or len(tensors[name].shape) != 1 or f"{module}.weight" in tensors:
        return name
    return f"{module}.weight"
