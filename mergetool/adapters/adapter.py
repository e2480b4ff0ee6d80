"""A LoRA file's statement for one module, and the change to one part of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ChangeKind = Literal["lora", "loha", "lokr", "full", "whole"]
"""A product of two factors; LoHa, the element-wise product of two such; LoKr, a Kronecker product; a whole difference; a weight
that takes the model's place."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """The change of one module of a file, of all its rows.

    ``module`` is spelled as in the file. ``tensors`` maps roles (``up``, ``down``, ``mid``, ``w1_a``, ``w2``, ``t2``, ``diff``,
    ``diff_b``, ``set_weight``, ``dora_scale``...) to stored names. ``shape`` is that of the change, [out, in] or [out, in, kh, kw]; all rows of a
    fused ``qkv``. ``rank`` is the inner width, None where there is none. ``scale`` multiplies the product: alpha / rank, and 1
    where the file states no alpha, which is how ComfyUI and diffusers read it. ``widens`` is whether it says that the weight is to be given as
    many columns (``reshape_weight``).
    """

    module: str
    kind: ChangeKind
    tensors: Mapping[str, str]
    shape: tuple[int, ...]
    rank: int | None
    scale: float = 1.0
    has_alpha: bool = False
    widens: bool = False


def is_by_columns(key: str, magnitudes: tuple[int, ...], rows: int) -> bool:
    """Whether a DoRA's magnitudes are those of input channels, by their shape.

    Else they are those of the ``rows`` of its change.

    [1, in] is; [out], [out, 1] and whatever PEFT calls a magnitude vector are of rows.
    """
    return len(magnitudes) > 1 and magnitudes[0] == 1 and rows != 1 and "magnitude_vector" not in key


@dataclass(frozen=True, slots=True)
class Change:
    """Rows ``[row, row + rows)`` of an adapter's change, to add to ``part``. ``part`` is a canonical name."""

    adapter: Adapter
    part: str
    row: int
    rows: int
