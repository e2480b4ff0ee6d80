"""ComfyUI's ``int8_tensorwise``: int8 with a scale a tensor or row. It is plain or rotated (ConvRot).

w = q * scale                            plain
w = (q_groups @ H) * scale               rotated, see `mergetool.quant.rotation`: the scale is the only rounding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, F32, DType
from mergetool.quant import rotation
from mergetool.quant.encoding import (
    SCALE_DTYPES,
    Encoding,
    Floats,
    Layer,
    Octets,
    Span,
    beside,
    column_factor,
    floats,
)
from mergetool.quant.quantiser import Quantiser, Round, TensorEntry

I8 = BY_CODE["I8"]


@dataclass(frozen=True)
class Int8(Encoding):
    """Integers [N, K] with 1 scale, or one a row.

    ``scales`` is their number; ``group`` is the columns that were rotated together, 0 for none.
    """

    scale: str
    scale_dtype: DType
    scales: int
    group: int

    @property
    def label(self) -> str:
        """Dequantiser, and whether it is rotated."""
        return f"int8 rotated by {self.group} (ConvRot)" if self.group else "int8"

    @property
    def quant(self) -> str | None:
        """``int8``, or ``int8-convrot`` for one rotated by the usual groups. Others are not written."""
        if self.columns is not None:
            return None
        usual = self.group == rotation.usual(self.padded[1])
        return "int8" if not self.group else "int8-convrot" if usual else None

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """All of them."""
        return ((self.scale, self.scale_dtype, self.scales),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        width, size = self.padded[1], self.scale_dtype.itemsize
        scale = Span(self.scale, 0, size) if self.scales == 1 else Span(self.scale, row * size, rows * size)
        return Span(self.tensor, row * width, rows * width), scale

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        codes = np.frombuffer(raw[0], np.int8).reshape(rows, -1)
        if self.group:
            rotation.rotate_codes(codes, self.group, out)
        else:
            np.copyto(out, codes)
        out *= floats(raw[1], self.scale_dtype)[:, None]

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The scale; a rotation leaves the size of the noise as it is."""
        return floats(raw[1], self.scale_dtype)[:, None]


def encoding_of(layer: Layer) -> Int8:
    """Read the layer as int8. Raises DataError where its tensors and its marker contradict each other."""
    rows, columns = shape = layer.matrix(I8)
    scale, info = layer.side("weight_scale", *SCALE_DTYPES)
    if info.numel != 1 and info.shape not in ((rows,), (rows, 1)):
        layer.refuse(f"has a scale of shape {list(info.shape)}", f"one float, [{rows}] or [{rows}, 1]")
    size = layer.rotation()
    group = 0 if size is None else rotation.checked(layer, size, columns)
    factor = column_factor(layer, columns)
    return Int8(layer.tensor, beside(layer), shape, shape, factor, scale, info.dtype, info.numel, group)


class Int8Quantiser(Quantiser):
    """ComfyUI's ``int8_tensorwise`` by rows: scale = amax / 127, code = round(w / scale). Ties go to even."""

    quant = "int8"
    config: Mapping[str, Any] = {"format": "int8_tensorwise"}
    rotates = True

    def read(self, layer: Layer) -> Int8:
        """See `encoding_of`."""
        return encoding_of(layer)

    def encoding(self, layer: str, shape: tuple[int, int]) -> Int8:
        """Not rotated."""
        scale = f"{layer}.weight_scale"
        return Int8(f"{layer}.weight", (scale, f"{layer}.comfy_quant"), shape, shape, None, scale, F32, shape[0], 0)

    def scale(self, amax: np.float32) -> np.float32:
        """1: every row has its own."""
        return np.float32(1)

    def encode(self, values: Floats, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
        """Integers [rows, columns] and the rows' scales. Integers are always rounded to nearest."""
        scales = np.maximum(np.abs(values).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-30))
        codes = np.rint(values / scales)
        np.clip(codes, -128, 127, out=codes)
        return codes.astype(np.int8).view(np.uint8), scales.view(np.uint8)

    def _stored(self, padded: tuple[int, int]) -> list[TensorEntry]:
        return [("weight", I8, padded), ("weight_scale", F32, (padded[0], 1))]


CONTAINER = Int8Quantiser()
