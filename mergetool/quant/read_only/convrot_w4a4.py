"""ComfyUI's ``convrot_w4a4``: rotated integers of 4 bits with a scale a row.

    w = (q_groups @ H) * scale

The even column is in a byte's low nibble. ``linear_dtype`` in the marker says how inputs are rounded, and nothing of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, DType
from mergetool.quant import nibbles, rotation
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import SCALE_DTYPES, Encoding, Floats, Layer, Span, beside, column_factor, floats
from mergetool.quant.spellings import SCALE

I8 = BY_CODE["I8"]


@dataclass(frozen=True)
class ConvRotW4A4(Encoding):
    """Packed integers [N, K/2] with a scale a row, rotated by ``group`` columns."""

    scale: str
    scale_dtype: DType
    group: int

    @property
    def label(self) -> str:
        """Dequantiser and rotation."""
        return f"int4 rotated by {self.group} (ConvRot W4A4)"

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """The rows'."""
        return ((self.scale, self.scale_dtype, self.padded[0]),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        packed, size = self.padded[1] // 2, self.scale_dtype.itemsize
        return Span(self.tensor, row * packed, rows * packed), Span(self.scale, row * size, rows * size)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        codes = np.empty_like(out)
        nibbles.take(nibbles.SIGNED, np.frombuffer(raw[0], np.uint8).reshape(rows, -1), codes)
        rotation.rotate_codes(codes, self.group, out)
        out *= floats(raw[1], self.scale_dtype)[:, None]

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The scale; a rotation leaves the size of the noise as it is."""
        return floats(raw[1], self.scale_dtype)[:, None]


class ConvRotW4A4Dequantiser(Dequantiser):
    """See the module."""

    title = "convrot_w4a4"
    formats = ("convrot_w4a4",)
    rotates = True

    def read(self, layer: Layer) -> ConvRotW4A4:
        """The layer; raises DataError where its tensors contradict each other."""
        rows, packed = layer.matrix(I8)
        scale, info = layer.side(SCALE, *SCALE_DTYPES)
        if info.shape not in ((rows,), (rows, 1)):
            layer.refuse(f"has a scale of shape {list(info.shape)}", f"[{rows}] or [{rows}, 1]")
        shape = rows, 2 * packed
        group = rotation.always(layer, shape[1])
        if layer.setting("quant_group_size", 64) != 64:
            layer.refuse('has another "quant_group_size"', "64, the only one there is,")
        factor = column_factor(layer, shape[1])
        return ConvRotW4A4(layer.tensor, beside(layer), shape, shape, factor, scale, info.dtype, group)


CONTAINER = ConvRotW4A4Dequantiser()
