"""The family of a model nobody taught mergetool: every tensor is a part under its own name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergetool.arch import control, encoders
from mergetool.arch.anatomy import Anatomy, Family, Part, natural_key
from mergetool.arch.prefixes import Names
from mergetool.checkpoint.header import TensorInfo
from mergetool.errors import UsageError
from mergetool.quant.encoding import Encoding
from mergetool.quant.weights import side_tensors

_ATTENTION = frozenset(
    {"attention", "attn", "attn1", "attn2", "self_attention", "self_attn", "cross_attention", "cross_attn"}
    | {"img_attn", "txt_attn"}
)
_FFN = frozenset({"ffn", "feed_forward", "feedforward", "ff", "ff_context", "mlp", "img_mlp", "txt_mlp"})
_DERIVED = ("matrix", "norm", "bias", "attention", "ffn")


class Generic(Family):
    """Any architecture: tensors keep their names, and names and shapes give the groups.

    Groups: each top-level path component (``double_blocks``); ``matrix`` (two or more dimensions), ``norm``
    (1-D ``weight`` or ``scale``), ``bias``; ``attention`` and ``ffn`` for tensors under a component of such
    a name. A top-level component that is called like one of those five is reached by a glob (``norm.*``).
    """

    name = "generic"
    layouts = ("plain",)
    group_order = _DERIVED
    keeps_names = True

    def variant(self, anatomy: Anatomy, config: Mapping[str, Any] | None = None) -> str | None:
        """See `Family.variant`: a ControlNet's or an adapter's kind."""
        return control.kind_of(anatomy.parts)

    def groups(self, part: str, shape: tuple[int, ...]) -> frozenset[str]:
        """The derived groups of a part, and its top-level component when it has one."""
        beside = encoders.groups(part)
        if beside:
            return beside
        components = part.split(".")
        found = set()
        if len(components) > 1 and components[0] and components[0] not in _DERIVED:
            found.add(components[0])
        if len(shape) >= 2:
            found.add("matrix")
        elif len(shape) == 1 and components[-1] in ("weight", "scale"):
            found.add("norm")
        if components[-1] == "bias":
            found.add("bias")
        if not _ATTENTION.isdisjoint(components):
            found.add("attention")
        if not _FFN.isdisjoint(components):
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
                f'mergetool knows no layout "{layout}" of this model, whose family it does not know; it keeps the names that its '
                "file gives it: leave `layout` out (`prefix` changes what stands before them)."
            )

    def order(self, part: str) -> tuple[object, ...]:
        """Natural order of names: ``blocks.2`` before ``blocks.10``."""
        return natural_key(part)


GENERIC = Generic()


def anatomy_of(
    names: Names, tensors: Mapping[str, TensorInfo], encodings: Mapping[str, Encoding], outside: Mapping[str, Part]
) -> Anatomy:
    """Make every tensor of the model a part, under its own name. Markers and scales of quantised weights stay beside.

    ``tensors`` and ``encodings`` are under the model's own names too. A norm's ``scale`` is the part ``weight``: programs read either.
    """
    parts: dict[str, Part] = {}
    sides = side_tensors(names.own, encodings)
    for stored, name in names.own.items():
        if stored not in sides:
            part = _canonical(name, tensors)
            parts[part] = replace(Part.whole(stored, tensors[name], encodings.get(name)), name=part)
    return Anatomy(
        GENERIC, "plain", names.prefix, parts, outside, tuple(stored for stored in names.own if stored in sides)
    )


def _canonical(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The part's name: ``X.weight`` for the vector ``X.scale`` of a norm, which has no other weight."""
    module, dot, leaf = name.rpartition(".")
    if leaf != "scale" or not dot or len(tensors[name].shape) != 1 or f"{module}.weight" in tensors:
        return name
    return f"{module}.weight"
