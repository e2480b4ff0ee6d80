"""FP8 with scales: ComfyUI's old "scaled fp8" and its ``float8_e4m3fn``/``float8_e5m2`` layers, and FP8 scaled by rows or blocks.

    w[n, k] = float(q[n, k]) * scale[n, k]

where ``scale`` is one float for the tensor, one a row ([N] or [N, 1]), one a block of columns ([N, B] or [N, B, 1]; musubi-tuner has blocks
of 64), or one a square block ([N/b, K/b]). Output has one scale a tensor, ``amax / 448``, since that is what ComfyUI multiplies with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.checkpoint.dtypes import F8_E4M3, F8_E5M2, F32, DType
from mergetool.quant.encoding import SCALE_DTYPES, Encoding, Floats, Layer, Octets, Span, beside, column_factor, floats
from mergetool.quant.fp8 import spacing, widen
from mergetool.quant.quantiser import Entry, Quantiser, Round, positive

FORMATS = {"float8_e4m3fn": F8_E4M3, "float8_e5m2": F8_E5M2}
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class ScaledFp8(Encoding):
    """FP8 codes [N, K] and their scales; ``grid`` is how many scales there are along the rows and the columns."""

    dtype: DType
    scale: str
    scale_dtype: DType
    grid: tuple[int, int]

    @property
    def label(self) -> str:
        """Container, element type and what a scale is for."""
        (across, along), (rows, columns) = self.grid, self.padded
        per = "" if self.grid == (1, 1) else " by rows" if along == 1 else f" by blocks of {columns // along}"
        assert rows % across == 0
        return f"scaled FP8 ({self.dtype.name.removeprefix('fp8_')}){per}"

    @property
    def quant(self) -> str | None:
        """``fp8-scaled`` for e4m3 with one scale and no column factor."""
        return "fp8-scaled" if self.dtype is F8_E4M3 and self.grid == (1, 1) and self.columns is None else None

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        width, (across, along) = self.padded[1], self.grid
        block = self.padded[0] // across
        first, last = (row // block, -(-(row + rows) // block)) if across > 1 else (0, 1)
        size = along * self.scale_dtype.itemsize
        return Span(self.tensor, row * width, rows * width), Span(self.scale, first * size, (last - first) * size)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        codes, scales = self._codes(raw, row, rows)
        widen(codes, self.dtype, out.reshape(codes.shape), scales)

    def scaled(self, raw: Sequence[memoryview]) -> tuple[memoryview, DType, float] | None:
        """Of a weight with one scale."""
        if self.grid != (1, 1) or self.columns is not None or self.width != self.padded[1]:
            return None
        return raw[0], self.dtype, float(floats(raw[1], self.scale_dtype)[0])

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The spacing of FP8 numbers times the scale."""
        codes, scales = self._codes(raw, row, rows)
        return spacing(codes, self.dtype, scales).reshape(rows, -1)

    def _codes(self, raw: Sequence[memoryview], row: int, rows: int) -> tuple[Octets, Floats | np.float32]:
        """Codes [rows, blocks, columns of a block], and scales that broadcast against them."""
        across, along = self.grid
        codes = np.frombuffer(raw[0], np.uint8).reshape(rows, along, -1)
        scales = floats(raw[1], self.scale_dtype).reshape(-1, along)
        if self.grid == (1, 1):
            return codes, scales[0, 0]
        if across > 1:
            block = self.padded[0] // across
            scales = scales[np.arange(row, row + rows) // block - row // block]
        return codes, np.broadcast_to(scales, (rows, along))[:, :, None]


def encoding_of(layer: Layer) -> ScaledFp8:
    """The layer as scaled FP8; raises DataError where its weight, scales and marker contradict each other."""
    shape = layer.matrix(F8_E4M3, F8_E5M2)
    said = layer.config.get("format") if layer.config else None
    if said is not None and FORMATS.get(said) is not layer.weight.dtype:
        layer.refuse(f"has a weight of {layer.weight.dtype.code}", f"one of {FORMATS[said].code}")
    scale, info = layer.side("weight_scale", *SCALE_DTYPES)
    grid = _grid(shape, info.shape)
    if grid is None:
        layer.refuse(
            f"has a scale of shape {list(info.shape)} for a weight of {list(shape)}",
            f"one scale, one a row ([{shape[0]}] or [{shape[0]}, 1]), or one a block",
        )
    columns = column_factor(layer, shape[1])
    return ScaledFp8(layer.tensor, beside(layer), shape, shape, columns, layer.weight.dtype, scale, info.dtype, grid)


def _grid(shape: tuple[int, int], scale: tuple[int, ...]) -> tuple[int, int] | None:
    """Scales along the rows and along the columns; None for a shape that scales nothing sensible."""
    rows, columns = shape
    if all(size == 1 for size in scale):
        return 1, 1
    if len(scale) == 3 and scale[2] == 1:
        scale = scale[:2]
    if scale in ((rows,), (rows, 1)):
        return rows, 1
    if len(scale) != 2 or 0 in scale or rows % scale[0] or columns % scale[1]:
        return None
    high, wide = rows // scale[0], columns // scale[1]
    return (scale[0], scale[1]) if wide >= SMALLEST_BLOCK and high in (1, wide) else None


class ScaledFp8Quantiser(Quantiser):
    """ComfyUI's ``float8_e4m3fn``: scale = amax / 448, code = round(w * (1 / scale)), as comfy-kitchen computes it.

    Marked for matrix products in full precision: without a calibrated ``input_scale`` FP8 hardware would cast activations with scale 1.
    """

    quant = "fp8-scaled"
    config: Mapping[str, Any] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}

    def encoding(self, layer: str, shape: tuple[int, int]) -> ScaledFp8:
        """One scale for the tensor."""
        scale, marker = f"{layer}.weight_scale", f"{layer}.comfy_quant"
        return ScaledFp8(f"{layer}.weight", (scale, marker), shape, shape, None, F8_E4M3, scale, F32, (1, 1))

    def scale(self, amax: np.float32) -> np.float32:
        """``amax / 448``."""
        return positive(np.float32(amax) / np.float32(F8_E4M3.largest))

    def encode(self, values: Floats, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
        """Codes [rows, columns]."""
        return (round_to(values, F8_E4M3, np.float32(1) / scale),)  # amax / scale may come out an ulp above 448

    def _stored(self, padded: tuple[int, int]) -> list[Entry]:
        return [("weight", F8_E4M3, padded)]

    @property
    def _tensor_scale_leaf(self) -> str:
        return "weight_scale"
