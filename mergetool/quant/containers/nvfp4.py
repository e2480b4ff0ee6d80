"""nvfp4: 4-bit floats (E2M1), an e4m3 scale for 16, and one float32 scale a tensor.

    w[n, k] = lut(q[n, k]) * (weight_scale_2 * block_scale[n, k // 16])

ComfyUI's layers (marked ``nvfp4``) hold the even column in a byte's high nibble and the block scales in tiles; BFL's, which have the same names and at
Z-Image's sizes the same shapes but no marker, the even column in the low nibble and the scales in plain order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, F8_E4M3, F32, DType
from mergetool.quant import block_scales, nibbles
from mergetool.quant.block_scales import tiled
from mergetool.quant.encoding import Encoding, Floats, Layer, Octets, Span, beside, column_factor, rounded_up
from mergetool.quant.fp8 import narrow, round_to_bits, widen
from mergetool.quant.quantiser import Quantiser, Round, TensorEntry, positive

U8, F4 = BY_CODE["U8"], BY_CODE["F4"]
BLOCK = 16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

LARGEST = 6.0

# Twice a magnitude -> its code.
_CODE_OF_HALVES = np.array([0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7], np.uint8)

# Magnitude -> its step. Between steps a and b, as at 2 and 4, noise is that of the step whose square is a^2 - ab + b^2.
_STEPS = np.array([0.5, 0.5, 0.5, 0.5, 0.75**0.5, 1, 3**0.5, 2], np.float32)

_HIGH_FIRST, _LOW_FIRST = nibbles.pairs(E2M1, high_first=True), nibbles.pairs(E2M1)


@dataclass(frozen=True)
class Nvfp4(Encoding):
    """Packed 4-bit codes [N, K/2]. ``comfyui`` says which of two orders nibbles and scales have."""

    block_scale: str
    tensor_scale: str
    comfyui: bool

    @property
    def label(self) -> str:
        """Dequantiser and whose."""
        return "nvfp4" if self.comfyui else "nvfp4 (BFL's order)"

    @property
    def quant(self) -> str | None:
        """``nvfp4`` for ComfyUI's order."""
        return "nvfp4" if self.comfyui and self.columns is None else None

    @property
    def pads(self) -> bool:
        """True."""
        return True

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Both sides are padded to whole blocks of 16."""
        return tuple(rounded_up(size, BLOCK) for size in shape) == self.padded

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """The tensor's."""
        return ((self.tensor_scale, F32, 1),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        packed, blocks = self.padded[1] // 2, self.padded[1] // BLOCK
        if self.comfyui:
            scales = block_scales.span(self.block_scale, row, rows, blocks)
        else:
            scales = Span(self.block_scale, row * blocks, rows * blocks)
        return Span(self.tensor, row * packed, rows * packed), scales, Span(self.tensor_scale, 0, 4)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        pairs = _HIGH_FIRST if self.comfyui else _LOW_FIRST
        nibbles.take(pairs, np.frombuffer(raw[0], np.uint8).reshape(rows, -1), out)
        values = out.reshape(rows, -1, BLOCK)
        values *= self._scales(raw, row, rows)[:, :, None]

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """0.5 to 2, by the magnitude of the code, times the block's scale."""
        packed = np.frombuffer(raw[0], np.uint8).reshape(rows, -1)
        steps = np.stack([_STEPS[packed & 7], _STEPS[packed >> 4 & 7]], axis=2).reshape(rows, -1, BLOCK)
        steps = steps if not self.comfyui else steps.reshape(rows, -1, 2)[:, :, ::-1].reshape(steps.shape)
        return (steps * self._scales(raw, row, rows)[:, :, None]).reshape(rows, -1)

    def _scales(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The scales of the codes of each block, [rows, blocks]."""
        blocks = self.padded[1] // BLOCK
        codes = block_scales.untiled(raw[1], row, rows, blocks) if self.comfyui else np.frombuffer(raw[1], np.uint8)
        scale = np.empty((rows, blocks), np.float32)
        widen(np.ascontiguousarray(codes).reshape(rows, blocks), F8_E4M3, scale)
        scale *= np.frombuffer(raw[2], "<f4")[0]
        return scale


def encoding_of(layer: Layer) -> Nvfp4:
    """The layer as nvfp4; raises DataError where its tensors contradict each other."""
    rows, packed = layer.matrix(U8)
    columns = 2 * packed
    comfyui = layer.config is not None
    if columns % BLOCK:
        layer.refuse(f"has a weight of {packed} bytes a row", f"a multiple of {BLOCK // 2}")
    scale, info = layer.side("weight_scale", F8_E4M3, U8)
    wanted = block_scales.stored_shape(rows, columns // BLOCK) if comfyui else (rows, columns // BLOCK)
    flat = comfyui and info.shape == (wanted[0] * wanted[1],)
    if info.shape != wanted and not flat:
        layer.refuse(f"has block scales of shape {list(info.shape)}", f"{list(wanted)}")
    total, total_info = layer.side("weight_scale_2", F32)
    if total_info.numel != 1:
        layer.refuse(f'has a "weight_scale_2" of shape {list(total_info.shape)}', "one float")
    shape = (rows, columns)
    return Nvfp4(layer.tensor, beside(layer), shape, shape, column_factor(layer, columns), scale, total, comfyui)


class Nvfp4Quantiser(Quantiser):
    """ComfyUI's ``nvfp4``, as comfy-kitchen computes it.

    tensor scale = amax / (448 * 6); block scale = e4m3(block's amax / 6 / tensor scale); code = e2m1(w / (tensor scale * block scale)).
    """

    quant = "nvfp4"
    multiple = BLOCK
    config: Mapping[str, Any] = {"format": "nvfp4"}
    scales = frozenset({"weight_scale_2"})

    def claims(self, layer: Layer) -> bool:
        """BFL's files have no marker."""
        return layer.weight.dtype is U8 and "weight_scale_2" in layer.sides

    def read(self, layer: Layer) -> Nvfp4:
        """See `encoding_of`."""
        return encoding_of(layer)

    def encoding(self, layer: str, shape: tuple[int, int]) -> Nvfp4:
        """ComfyUI's order."""
        scale, total, marker = (f"{layer}.{leaf}" for leaf in ("weight_scale", "weight_scale_2", "comfy_quant"))
        return Nvfp4(f"{layer}.weight", (scale, total, marker), shape, self.padded(shape), None, scale, total, True)

    def scale(self, amax: np.float32) -> np.float32:
        """``amax / (448 * 6)``."""
        return positive(np.float32(amax) / np.float32(F8_E4M3.largest * LARGEST))

    def encode(self, values: Floats, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
        """Packed codes [rows, columns / 2] and tiled block scales. Block scales are always rounded to nearest."""
        blocks = values.reshape(len(values), -1, BLOCK)
        wanted = np.abs(blocks).max(axis=2) / np.float32(LARGEST) / scale
        scales = narrow(wanted, F8_E4M3)
        total = np.empty_like(wanted)
        widen(scales, F8_E4M3, total, scale)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            scaled = blocks / total[:, :, None]
        scaled[total == 0] = 0
        np.clip(scaled, -LARGEST, LARGEST, out=scaled)
        rounded = round_to_bits(scaled, mantissa=1, lowest=0)
        codes = _CODE_OF_HALVES[(np.abs(rounded) * 2).astype(np.uint8)] | (np.signbit(rounded).astype(np.uint8) << 3)
        codes = codes.reshape(len(values), -1, 2)
        return (codes[:, :, 0] << 4 | codes[:, :, 1]).astype(np.uint8, copy=False), tiled(scales)

    def _stored(self, padded: tuple[int, int]) -> list[TensorEntry]:
        rows, columns = padded
        scales = block_scales.stored_shape(rows, columns // BLOCK)
        return [("weight", U8, (rows, columns // 2)), ("weight_scale", F8_E4M3, scales)]

    @property
    def _tensor_scale_leaf(self) -> str:
        return "weight_scale_2"


CONTAINER = Nvfp4Quantiser()
