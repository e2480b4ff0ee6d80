"""The family of a model nobody taught mergetool: every tensor is a part under its own name."""

from __future__ import annotations

from collections.abc import Mapping

from mergetool.arch.anatomy import Anatomy, Family, Part, natural_key
from mergetool.arch.bundled import bundled
from mergetool.checkpoint.header import TensorInfo
from mergetool.quant.containers import is_side_tensor
from mergetool.quant.encoding import Encoding

_ATTENTION = frozenset(
    {"attention", "attn", "attn1", "attn2", "self_attention", "self_attn", "cross_attention", "cross_attn"}
    | {"img_attn", "txt_attn"}
)
_FFN = frozenset({"ffn", "feed_forward", "feedforward", "ff", "ff_context", "mlp", "img_mlp", "txt_mlp"})
_DERIVED = ("matrix", "norm", "bias", "attention", "ffn")


class Generic(Family):
    """Any architecture, with identical names in and out, and groups read off the names and shapes.

    Groups: each top-level path component (``double_blocks``); ``matrix`` (two or more dimensions), ``norm``
    (1-D ``weight`` or ``scale``), ``bias``; ``attention`` and ``ffn`` for tensors under a component of such
    a name. A top-level component that is called like one of those five is reached by a glob (``norm.*``).
    """

    name = "generic"
    layouts = ("plain",)
    group_order = _DERIVED

    def groups(self, part: str, shape: tuple[int, ...]) -> frozenset[str]:
        """The derived groups of a part, and its top-level component when it has one."""
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

    def order(self, part: str) -> tuple[object, ...]:
        """Natural order of names: ``blocks.2`` before ``blocks.10``."""
        return natural_key(part)


GENERIC = Generic()


def anatomy_of(tensors: Mapping[str, TensorInfo], encodings: Mapping[str, Encoding]) -> Anatomy:
    """Every tensor as a part under its stored name; what is bundled with the model, and markers and scales of quantised weights, beside."""
    whole = {name: Part.whole(name, info, encodings.get(name)) for name, info in tensors.items()}
    outside = {name: whole[name] for name in bundled(tensors)}
    parts = {name: part for name, part in whole.items() if name not in outside and not is_side_tensor(name)}
    sides = tuple(name for name in tensors if name not in parts and name not in outside)
    return Anatomy(GENERIC, layout="plain", prefix="", parts=parts, outside=outside, sides=sides)
