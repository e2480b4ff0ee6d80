"""mxfp8: e4m3 codes and a power-of-two scale (E8M0) for 32 of them. OCP Microscaling Formats 1.0 defines it.

    w[n, k] = float(q[n, k]) * 2 ** (e[n, k // 32] - 127)

The scales lie in tiles, like those of nvfp4. A scale byte of 255 is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, F8_E4M3
from mergetool.quant import block_scales
from mergetool.quant.block_scales import tiled
from mergetool.quant.encoding import Encoding, Floats, Layer, Octets, Span, beside, column_factor, rounded_up
from mergetool.quant.fp8 import spacing, widen
from mergetool.quant.quantiser import Quantiser, Round, TensorEntry

U8, E8M0 = BY_CODE["U8"], BY_CODE["F8_E8M0"]
BLOCK = 32


@dataclass(frozen=True)
class Mxfp8(Encoding):
    """e4m3 codes [N, K] with tiled E8M0 scales."""

    block_scale: str

    @property
    def label(self) -> str:
        """``mxfp8``."""
        return "mxfp8"

    @property
    def quant(self) -> str | None:
        """``mxfp8``."""
        return "mxfp8" if self.columns is None else None

    @property
    def pads(self) -> bool:
        """True."""
        return True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Both sides are padded to whole blocks of 32."""
        return tuple(rounded_up(size, BLOCK) for size in shape) == self.padded

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        width = self.padded[1]
        scales = block_scales.span(self.block_scale, row, rows, width // BLOCK)
        return Span(self.tensor, row * width, rows * width), scales

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        codes, scales = self._codes(raw, row, rows)
        widen(codes, F8_E4M3, out.reshape(codes.shape), scales)

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The spacing of FP8 numbers times the block's scale."""
        codes, scales = self._codes(raw, row, rows)
        return spacing(codes, F8_E4M3, scales).reshape(rows, -1)

    def _codes(self, raw: Sequence[memoryview], row: int, rows: int) -> tuple[Octets, Floats]:
        """Codes [rows, blocks, 32] and scales [rows, blocks, 1]."""
        blocks = self.padded[1] // BLOCK
        exponents = np.ascontiguousarray(block_scales.untiled(raw[1], row, rows, blocks))
        codes = np.frombuffer(raw[0], np.uint8).reshape(rows, blocks, BLOCK)
        return codes, power_of_two(exponents)[:, :, None]


def power_of_two(exponents: Octets) -> Floats:
    """E8M0 bytes as float32: ``2 ** (e - 127)``, exactly; 255 is NaN."""
    bits = exponents.astype(np.uint32) << np.uint32(23)
    bits[exponents == 0] = 0x00400000  # 2^-127 is a subnormal float32
    bits[exponents == 255] = 0x7FC00000
    return bits.view(np.float32)


def encoding_of(layer: Layer) -> Mxfp8:
    """The layer as mxfp8; raises DataError where its tensors contradict each other."""
    rows, columns = shape = layer.matrix(F8_E4M3)
    if columns % BLOCK:
        layer.refuse(f"has a weight of {columns} columns", f"a multiple of {BLOCK}")
    scale, info = layer.side("weight_scale", E8M0, U8)
    wanted = block_scales.stored_shape(rows, columns // BLOCK)
    if info.shape not in (wanted, (wanted[0] * wanted[1],)):
        layer.refuse(f"has block scales of shape {list(info.shape)}", f"{list(wanted)}")
    return Mxfp8(layer.tensor, beside(layer), shape, shape, column_factor(layer, columns), scale)


class Mxfp8Quantiser(Quantiser):
    """ComfyUI's ``mxfp8``: a power-of-two scale a block, code = e4m3(w / scale).

    The scale is the least power of two at or above the block's amax / 448.

    comfy-kitchen takes that power from a rounded logarithm, which is one too low where amax / 448 is just above a power of two; the largest
    value of such a block is then cut to 448 times the scale.
    """

    quant = "mxfp8"
    multiple = BLOCK
    config: Mapping[str, Any] = {"format": "mxfp8"}

    def read(self, layer: Layer) -> Mxfp8:
        """See `encoding_of`."""
        return encoding_of(layer)

    def encoding(self, layer: str, shape: tuple[int, int]) -> Mxfp8:
        """Tiled scales."""
        scale = f"{layer}.weight_scale"
        return Mxfp8(f"{layer}.weight", (scale, f"{layer}.comfy_quant"), shape, self.padded(shape), None, scale)

    def scale(self, amax: np.float32) -> np.float32:
        """1: every block has its own."""
        return np.float32(1)

    def encode(self, values: Floats, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
        """Codes [rows, columns] and tiled block scales."""
        blocks = values.reshape(len(values), -1, BLOCK)
        largest = np.abs(blocks).max(axis=2)
        bits = (largest / np.float32(F8_E4M3.largest)).view(np.uint32)
        exponents = (bits >> 23) + ((bits & 0x7FFFFF) != 0)
        exponents[largest == 0] = 0
        scales = np.minimum(exponents, 254).astype(np.uint8)
        scaled = blocks / power_of_two(scales)[:, :, None]
        return round_to(scaled.reshape(values.shape), F8_E4M3), tiled(scales)

    def _stored(self, padded: tuple[int, int]) -> list[TensorEntry]:
        rows, columns = padded
        return [
            ("weight", F8_E4M3, padded),
            ("weight_scale", E8M0, block_scales.stored_shape(rows, columns // BLOCK)),
        ]


CONTAINER = Mxfp8Quantiser()
