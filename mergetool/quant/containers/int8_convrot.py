"""ComfyUI's ``int8_tensorwise`` by rows, rotated (ConvRot) before it is quantised.

    code = round((w_groups @ H) / scale), scale = amax of the rotated row / 127

Groups are of 256 columns, or of the largest power of 4 that divides a weight's; `mergetool.quant.rotation` has H. Outliers of a group are spread over
all of it, so that a row's scale need not be as large as its largest weight. Reading is that of int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mergetool.quant import rotation
from mergetool.quant.containers.int8 import Int8, Int8Quantiser
from mergetool.quant.encoding import Floats, Octets
from mergetool.quant.quantiser import Round


class ConvRotQuantiser(Int8Quantiser):
    """See the module. comfy-kitchen rotates by a product that adds in another order."""

    quant = "int8-convrot"

    def of_shape(self, shape: tuple[int, int]) -> Mapping[str, Any]:
        """The rotation."""
        group = rotation.usual(shape[1])
        return {"convrot": True, "convrot_groupsize": group} if group else {}

    def encoding(self, layer: str, shape: tuple[int, int]) -> Int8:
        """Rotated where 4 divides the columns."""
        return replace(super().encoding(layer, shape), group=rotation.usual(shape[1]))

    def encode(self, values: Floats, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
        """Integers [rows, columns] and the rows' scales."""
        rotated = values.copy()
        rotation.rotate(rotated, rotation.usual(values.shape[1]))
        return super().encode(rotated, scale, round_to)


CONTAINER = ConvRotQuantiser()
