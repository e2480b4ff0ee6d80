"""ComfyUI's ``awq_w4a16``: 4-bit codes with a scale and a zero for groups of columns.

    w[n, k] = (q[n, k] - 8) * scale[k // g, n] + zero[k // g, n]

The even column is in a byte's low nibble; ``g`` follows from the shapes. comfy-kitchen computes it in two steps that round; so do we, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, DType
from mergetool.quant import group_scales, nibbles
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import SCALE_DTYPES, Encoding, Floats, Layer, Span, beside, column_factor
from mergetool.quant.spellings import SCALE

I8, U8 = BY_CODE["I8"], BY_CODE["U8"]
ZEROS = "weight_zeros"


@dataclass(frozen=True)
class AwqW4A16(Encoding):
    """Packed codes [N, K/2] with scales and zeros [K/group, N]."""

    scale: tuple[str, DType]
    zeros: tuple[str, DType]
    group: int

    @property
    def label(self) -> str:
        """Dequantiser."""
        return f"int4 with zeros by groups of {self.group} (AWQ W4A16)"

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """The groups'."""
        return ((*self.scale, self.padded[0] * self.padded[1] // self.group),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        packed = self.padded[1] // 2
        groups = (group_scales.spans(*one, self.padded, self.group, row, rows) for one in (self.scale, self.zeros))
        return Span(self.tensor, row * packed, rows * packed), *(span for spans in groups for span in spans)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        nibbles.take(nibbles.OFFSET, np.frombuffer(raw[0], np.uint8).reshape(rows, -1), out)
        groups = out.reshape(rows, -1, self.group)
        count = groups.shape[1]
        groups *= group_scales.stacked(raw[1 : 1 + count], self.scale[1])[:, :, None]
        groups += group_scales.stacked(raw[1 + count : 1 + 2 * count], self.zeros[1])[:, :, None]

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The group's scale."""
        scales = group_scales.stacked(raw[1 : 1 + self.padded[1] // self.group], self.scale[1])
        return np.repeat(scales, self.group, axis=1)


class AwqDequantiser(Dequantiser):
    """See the module."""

    title = "awq_w4a16"
    formats = ("awq_w4a16",)
    scales = frozenset({ZEROS})

    def read(self, layer: Layer) -> AwqW4A16:
        """The layer; raises DataError where its tensors contradict each other."""
        rows, packed = layer.matrix(I8, U8)
        columns = 2 * packed
        scale, info = layer.side(SCALE, *SCALE_DTYPES)
        zeros, other = layer.side(ZEROS, *SCALE_DTYPES)
        shape = info.shape
        if len(shape) != 2 or shape[1] != rows or not shape[0] or columns % shape[0] or other.shape != shape:
            layer.refuse(f"has scales {list(shape)} and zeros {list(other.shape)}", f"[groups, {rows}] of both")
        group = columns // shape[0]
        if layer.setting("group_size", group) != group:
            layer.refuse(f'has groups of {group} by its scales and another "group_size"', "the same")
        both, factor = (rows, columns), column_factor(layer, columns)
        return AwqW4A16(
            layer.tensor, beside(layer), both, both, factor, (scale, info.dtype), (zeros, other.dtype), group
        )


CONTAINER = AwqDequantiser()
