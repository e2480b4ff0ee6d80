"""FP8 with scales, of a tensor, of rows or of blocks.

It is ComfyUI's old "scaled fp8", its ``float8_e4m3fn``/``float8_e5m2`` layers, and others' formats.

    w[n, k] = float(q[n, k]) * scale[n, k]

where ``scale`` is one float for the tensor, one a row ([N] or [N, 1]), one a block of columns ([N, B] or [N, B, 1]; musubi-tuner has blocks
of 64), or one a square block ([N/b, K/b], rounded up: the last blocks may be cut; 128 in DeepSeek's and Qwen's files). A convolution's weight counts as
[N, K] with K the elements of one output channel. Output has one scale a tensor, ``amax / 448``, since that is what ComfyUI multiplies with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.checkpoint.dtypes import F8_E4M3, F8_E5M2, F32, DType
from mergetool.quant.encoding import SCALE_DTYPES, Encoding, Floats, Layer, Octets, Span, beside, column_factor, floats
from mergetool.quant.fp8 import spacing, widen
from mergetool.quant.quantiser import Quantiser, Round, TensorEntry, positive
from mergetool.quant.spellings import SCALE, in_comfyui, leaf_of

FORMATS = {"float8_e4m3fn": F8_E4M3, "float8_e5m2": F8_E5M2}
SMALLEST_BLOCK = 16
USUAL_BLOCKS = (128, 64, 32, 16, 256)


@dataclass(frozen=True)
class ScaledFp8(Encoding):
    """FP8 codes [N, K] and a ``grid`` of scales, one for each ``block``.

    ``grid`` is how many there are along rows and columns.
    """

    dtype: DType
    scale: str
    scale_dtype: DType
    grid: tuple[int, int]
    block: tuple[int, int]

    @property
    def label(self) -> str:
        """Dequantiser, element type and the extent of a scale."""
        by_rows = self.block == (1, self.padded[1])
        per = "" if self.grid == (1, 1) else " by rows" if by_rows else f" by blocks of {self.block[1]}"
        return f"scaled FP8 ({self.dtype.name.removeprefix('fp8_')}){per}"

    @property
    def quant(self) -> str | None:
        """``fp8-scaled`` for an e4m3 matrix with one scale under a ComfyUI name, else None. It has no column factor."""
        written = self.dtype is F8_E4M3 and self.grid == (1, 1) and self.columns is None and len(self.shape) == 2
        return "fp8-scaled" if written and in_comfyui(leaf_of(self.scale)) else None

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.padded[0]

    @property
    def width(self) -> int:
        """Elements of one output channel."""
        return self.padded[1]

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """All of them."""
        return ((self.scale, self.scale_dtype, self.grid[0] * self.grid[1]),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        width, (across, along) = self.padded[1], self.grid
        high = self.block[0]
        first, last = (row // high, -(-(row + rows) // high)) if across > 1 else (0, 1)
        size = along * self.scale_dtype.itemsize
        return Span(self.tensor, row * width, rows * width), Span(self.scale, first * size, (last - first) * size)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        codes, scales = self._codes(raw, row, rows)
        widen(codes, self.dtype, out.reshape(codes.shape), scales)

    def scaled(self, raw: Sequence[memoryview]) -> tuple[memoryview, DType, float] | None:
        """The codes of a weight with one scale."""
        if self.grid != (1, 1) or self.columns is not None:
            return None
        return raw[0], self.dtype, float(floats(raw[1], self.scale_dtype)[0])

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The spacing of FP8 numbers times the scale."""
        codes, scales = self._codes(raw, row, rows)
        return spacing(codes, self.dtype, scales).reshape(rows, -1)

    def _codes(self, raw: Sequence[memoryview], row: int, rows: int) -> tuple[Octets, Floats | np.float32]:
        """Codes [rows, blocks, columns of a block], or [rows, columns, 1] where the last block is cut, and scales that broadcast."""
        (across, along), (high, wide) = self.grid, self.block
        codes = np.frombuffer(raw[0], np.uint8)
        scales = floats(raw[1], self.scale_dtype).reshape(-1, along)
        if self.grid == (1, 1):
            return codes.reshape(rows, 1, -1), scales[0, 0]
        if across > 1:
            scales = scales[np.arange(row, row + rows) // high - row // high]
        if wide * along == self.padded[1]:
            return codes.reshape(rows, along, wide), np.broadcast_to(scales, (rows, along))[:, :, None]
        each = np.repeat(np.broadcast_to(scales, (rows, along)), wide, axis=1)[:, : self.padded[1]]
        return codes.reshape(rows, -1, 1), np.ascontiguousarray(each)[:, :, None]


def encoding_of(layer: Layer) -> ScaledFp8:
    """Read the layer as scaled FP8. Raises DataError where its weight, scales and marker contradict each other."""
    matrix = layer.matrix(F8_E4M3, F8_E5M2, convolutions=True)
    said = layer.config.get("format") if layer.config else None
    if said is not None and FORMATS.get(said) is not layer.weight.dtype:
        layer.refuse(f"has a weight of {layer.weight.dtype.code}", f"one of {FORMATS[said].code}")
    scale, info = layer.side(SCALE, *SCALE_DTYPES)
    blocks = _blocks(matrix, info.shape, layer.blocks)
    if blocks is None:
        layer.refuse(
            f"has a scale of shape {list(info.shape)} for a weight of {list(layer.weight.shape)}",
            f"one scale, one a row ([{matrix[0]}] or [{matrix[0]}, 1]), or one a block",
        )
    factor = column_factor(layer, matrix[1])
    shape, dtype = layer.weight.shape, layer.weight.dtype
    return ScaledFp8(layer.tensor, beside(layer), shape, matrix, factor, dtype, scale, info.dtype, *blocks)


Sizes = tuple[int, int]


def _blocks(matrix: Sizes, scale: tuple[int, ...], said: Sizes | None) -> tuple[Sizes, Sizes] | None:
    """Scales along rows and columns, and the rows and columns of one; None for a shape that scales nothing sensible.

    A block of the size that the file's config says, or of 128, comes before other sizes that would fit.
    """
    rows, columns = matrix
    if all(size == 1 for size in scale):
        return (1, 1), matrix
    while len(scale) > 2 and scale[-1] == 1:
        scale = scale[:-1]
    if scale in ((rows,), (rows, 1)):
        return (rows, 1), (1, columns)
    if len(scale) != 2 or 0 in scale:
        return None
    across, along = scale
    for high, wide in (*((said,) if said else ()), *((size, size) for size in USUAL_BLOCKS)):
        if (-(-rows // high), -(-columns // wide)) == scale:
            return scale, (high, wide)
    high, wide = rows // across, columns // along
    fits = (high * across, wide * along) == matrix and wide >= SMALLEST_BLOCK and high in (1, wide)
    return (scale, (high, wide)) if fits else None


class ScaledFp8Quantiser(Quantiser):
    """ComfyUI's ``float8_e4m3fn``: scale = amax / 448, code = round(w * (1 / scale)). comfy-kitchen computes it so.

    Marked for matrix products in full precision: without a calibrated ``input_scale`` FP8 hardware would cast activations with scale 1.
    """

    quant = "fp8-scaled"
    config: Mapping[str, Any] = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}

    @property
    def formats(self) -> tuple[str, ...]:
        """Either of FP8's dtypes."""
        return tuple(FORMATS)

    def claims(self, layer: Layer) -> bool:
        """The old files have no marker for a layer."""
        return layer.weight.dtype in FORMATS.values()

    def read(self, layer: Layer) -> ScaledFp8:
        """See `encoding_of`."""
        return encoding_of(layer)

    def encoding(self, layer: str, shape: tuple[int, int]) -> ScaledFp8:
        """One scale for the tensor."""
        scale, marker = f"{layer}.weight_scale", f"{layer}.comfy_quant"
        return ScaledFp8(f"{layer}.weight", (scale, marker), shape, shape, None, F8_E4M3, scale, F32, (1, 1), shape)

    def scale(self, amax: np.float32) -> np.float32:
        """``amax / 448``."""
        return positive(np.float32(amax) / np.float32(F8_E4M3.largest))

    def encode(self, values: Floats, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
        """Codes [rows, columns]."""
        return (round_to(values, F8_E4M3, np.float32(1) / scale),)  # amax / scale may come out an ulp above 448

    def _stored(self, padded: tuple[int, int]) -> list[TensorEntry]:
        return [("weight", F8_E4M3, padded)]

    @property
    def _tensor_scale_leaf(self) -> str:
        return "weight_scale"


CONTAINER = ScaledFp8Quantiser()
