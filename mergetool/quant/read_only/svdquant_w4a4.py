"""ComfyUI's ``svdquant_w4a4``: smoothed 4-bit integers and a sum of low rank.

    w[n, k] = q[n, k] * scale[k // 64, n] / smooth[k] + (up @ down)[n, k]

It is the weight of the layer's whole input: the program divides the input by ``smooth`` and adds the low rank beside. float64 is rounded once.
Tensors lie in plain order, or in tiles of 128 rows (``kitchen_tile_packed_w4a4``), and their names stand with or without ``weight_`` before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, DType
from mergetool.quant import group_scales, nibbles
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import SCALE_DTYPES, Encoding, Floats, Layer, Octets, Span, beside, column_factor, floats
from mergetool.quant.spellings import SCALE

I8 = BY_CODE["I8"]
GROUP, TILE, INTERLEAVED = 64, 128, 4
DOWN, UP, SMOOTH = "weight_proj_down", "weight_proj_up", "weight_smooth_factor"

Side = tuple[str, DType]


@dataclass(frozen=True)
class SvdQuant(Encoding):
    """Packed integers [N, K/2] with scales [K/64, N] and the factors of a low rank.

    ``down`` is [K, rank], ``up`` [N, rank], ``smooth`` [K]. ``tiled`` has N in tiles of 128.
    """

    scale: Side
    down: Side
    up: Side
    smooth: Side
    rank: int
    tiled: bool

    @property
    def label(self) -> str:
        """Dequantiser and rank."""
        return f"int4 by groups of {GROUP} and rank {self.rank} (SVDQuant W4A4)"

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """All but the factors."""
        rows, columns = self.padded
        return (*self.scale, rows * columns // GROUP), (*self.smooth, columns)

    @property
    def tile_rows(self) -> int:
        """A tile."""
        return TILE if self.tiled else 1

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        columns = self.padded[1]
        row, rows = self._held(row, rows)
        size, each = self.up[1].itemsize, self.scale[1].itemsize * columns // GROUP
        scales = group_scales.spans(*self.scale, self.padded, GROUP, row, rows)
        return (
            Span(self.tensor, row * columns // 2, rows * columns // 2),
            Span(self.up[0], row * self.rank * size, rows * self.rank * size),
            Span(self.down[0], 0, columns * self.rank * self.down[1].itemsize),
            Span(self.smooth[0], 0, columns * self.smooth[1].itemsize),
            *([Span(self.scale[0], row * each, rows * each)] if self.tiled else scales),
        )

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        first, held = self._held(row, rows)
        mine = slice(row - first, row - first + rows)
        nibbles.take(nibbles.SIGNED, self._codes(raw, held)[mine], out)
        up = floats(raw[1], self.up[1])
        up = up.reshape(-1, self.rank, TILE).swapaxes(1, 2) if self.tiled else up
        down = floats(raw[2], self.down[1]).reshape(-1, self.rank).astype(np.float64)
        exact = out.astype(np.float64)
        groups = exact.reshape(rows, -1, GROUP)
        groups *= self._scales(raw, held)[mine][:, :, None]
        exact /= floats(raw[3], self.smooth[1])
        exact += up.reshape(held, self.rank)[mine].astype(np.float64) @ down.T
        out[:] = exact

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The group's scale, divided by the column's smoothing."""
        first, held = self._held(row, rows)
        scales = self._scales(raw, held)[row - first : row - first + rows]
        smooth = np.abs(floats(raw[3], self.smooth[1]))
        return np.divide(np.repeat(scales, GROUP, axis=1), smooth, dtype=np.float32)

    def _held(self, row: int, rows: int) -> tuple[int, int]:
        """The rows of whole tiles around ``[row, row + rows)``: the first, and how many."""
        if not self.tiled:
            return row, rows
        first = row // TILE * TILE
        return first, -(-(row + rows) // TILE) * TILE - first

    def _codes(self, raw: Sequence[memoryview], held: int) -> Octets:
        packed = np.frombuffer(raw[0], np.uint8)
        if self.tiled:
            packed = packed.reshape(-1, self.padded[1] // GROUP, TILE // INTERLEAVED, INTERLEAVED, GROUP // 2)
            packed = np.ascontiguousarray(packed.transpose(0, 2, 3, 1, 4))
        return packed.reshape(held, -1)

    def _scales(self, raw: Sequence[memoryview], held: int) -> Floats:
        """Scales [held rows, groups]."""
        if not self.tiled:
            return group_scales.stacked(raw[4 : 4 + self.padded[1] // GROUP], self.scale[1])
        return floats(raw[4], self.scale[1]).reshape(-1, self.padded[1] // GROUP, TILE).swapaxes(1, 2).reshape(held, -1)


class SvdQuantDequantiser(Dequantiser):
    """See the module."""

    title = "svdquant_w4a4"
    formats = ("svdquant_w4a4",)
    scales = frozenset({DOWN, UP, SMOOTH})
    beside_codes: Mapping[str, str] = MappingProxyType({"proj_down": DOWN, "proj_up": UP, "smooth_factor": SMOOTH})

    def read(self, layer: Layer) -> SvdQuant:
        """The layer. Raises DataError where its tensors contradict each other.

        It refuses a layer whose input was shifted, too, since its bias belongs to that input.
        """
        if layer.setting("act_unsigned", False) is not False:
            layer.refuse('has "act_unsigned", so that its bias is that of a shifted input', "an input as it is")
        stored, tiled = layer.weight.shape, len(layer.weight.shape) == 4
        rows, columns = (stored[0] * TILE, stored[1] * GROUP) if tiled else (stored[0], stored[-1] * 2)
        wanted = (rows // TILE, columns // GROUP, TILE // INTERLEAVED, INTERLEAVED * GROUP // 2)
        if layer.weight.dtype is not I8 or stored != (wanted if tiled else (rows, columns // 2)) or 0 in stored:
            layer.refuse(f"has a weight of {layer.weight.dtype.code} {list(stored)}", "a matrix of I8, or tiles of one")
        if columns % GROUP:
            layer.refuse(f"has {columns} columns", f"a multiple of {GROUP}")
        _, factor = layer.side(DOWN, *SCALE_DTYPES)
        rank = factor.shape[-1] if factor.shape else 0
        tiles, groups = rows // TILE, columns // GROUP
        shapes = {
            SCALE: (tiles, groups, TILE) if tiled else (groups, rows),
            DOWN: (columns, rank),
            UP: (tiles, rank, TILE) if tiled else (rows, rank),
            SMOOTH: (columns,),
        }
        sides = {leaf: self._side(layer, leaf, shape) for leaf, shape in shapes.items()}
        shape = rows, columns
        scale, up, smooth = sides[SCALE], sides[UP], sides[SMOOTH]
        columns_factor = column_factor(layer, columns)
        return SvdQuant(
            layer.tensor, beside(layer), shape, shape, columns_factor, scale, sides[DOWN], up, smooth, rank, tiled
        )

    def _side(self, layer: Layer, leaf: str, shape: tuple[int, ...]) -> Side:
        name, info = layer.side(leaf, *SCALE_DTYPES)
        if info.shape != shape or 0 in shape:
            layer.refuse(f"has {name.rpartition('.')[2]!r} of shape {list(info.shape)}", f"{list(shape)}")
        return name, info.dtype


CONTAINER = SvdQuantDequantiser()
