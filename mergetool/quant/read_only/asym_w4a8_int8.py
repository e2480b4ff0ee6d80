"""ComfyUI's ``asym_w4a8_int8``: codes of 4 or 6 bits that stand for int8, rotated.

    q8 = clip(round(level[code] * s_rel), -127, 127)
    w = ((q8 * s_channel + correction) groups @ H)

``level`` is the stored codebook of 16, or without one the code less 8 (of 6 bits: less 32). ``correction`` is a number a group that files with
uneven levels have. Without it the rotation is exact and the rows' scale the only rounding; with it float64 is rounded once. The even column is in a
byte's low nibble; of 6 bits a plane of low nibbles comes first, then one of the upper two, four columns a byte from its lowest bits on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, F8_E4M3, F32, DType
from mergetool.quant import nibbles, rotation
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import SCALE_DTYPES, Encoding, Floats, Layer, Span, beside, column_factor, floats
from mergetool.quant.fp8 import widen

I8, U8 = BY_CODE["I8"], BY_CODE["U8"]
RELATIVE, CHANNEL, CODEBOOK, CORRECTION = "weight_s_rel", "weight_s_channel", "weight_codebook", "weight_correction"
LEVELS = 16
USUAL_GROUP = 16


@dataclass(frozen=True)
class W4A8(Encoding):
    """Packed codes [N, K/2], or of 6 bits [N, 3K/4], with scales of groups and rows.

    ``relative`` scales are [N, K/group], those of the rows (``channel``) [N]; ``correction`` is [K/group, N].
    """

    bits: int
    group: int
    rotated: int
    relative: tuple[str, DType]
    channel: str
    codebook: str | None
    correction: tuple[str, DType] | None

    @property
    def label(self) -> str:
        """Dequantiser and rotation."""
        return f"int{self.bits} for int8, rotated by {self.rotated} (W{self.bits}A8)"

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """The rows', and those of groups that are plain floats."""
        rows, groups = self.padded[0], self.padded[1] // self.group
        own = ((self.relative[0], self.relative[1], rows * groups),) if self.relative[1] is F32 else ()
        return ((self.channel, F32, rows), *own)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        packed, groups = self.padded[1] * self.bits // 8, self.padded[1] // self.group
        (relative, dtype), size = self.relative, self.relative[1].itemsize
        spans = [
            Span(self.tensor, row * packed, rows * packed),
            Span(relative, row * groups * size, rows * groups * size),
            Span(self.channel, row * 4, rows * 4),
        ]
        if self.codebook is not None:
            spans.append(Span(self.codebook, 0, LEVELS * 4))
        if self.correction is not None:
            (name, dtype), total = self.correction, self.padded[0]
            size = dtype.itemsize
            spans += [Span(name, (i * total + row) * size, rows * size) for i in range(groups)]
        return tuple(spans)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        values = np.empty_like(out)
        groups = values.reshape(rows, -1, self.group)
        self._levels(raw, rows, values)
        groups *= self._relative(raw, rows)[:, :, None]
        np.rint(values, out=values)
        np.clip(values, -127, 127, out=values)
        channel = np.frombuffer(raw[2], "<f4")[:, None]
        if self.correction is None:
            rotation.rotate_codes(values, self.rotated, out)
            out *= channel
            return
        first = 4 if self.codebook is not None else 3
        added = np.stack([floats(one, self.correction[1]) for one in raw[first : first + groups.shape[1]]], axis=1)
        exact = values.astype(np.float64) * channel
        shifted = exact.reshape(groups.shape)
        shifted += added[:, :, None]
        rotation.rotate(exact, self.rotated)
        out[:] = exact

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The mean gap of neighbouring levels in each group."""
        table = np.frombuffer(raw[3], "<f4") if self.codebook is not None else np.arange(LEVELS, dtype=np.float32)
        gap = np.float32((table.max() - table.min()) / (LEVELS - 1))
        scale = self._relative(raw, rows) * np.frombuffer(raw[2], "<f4")[:, None]
        return np.repeat(scale * gap, self.group, axis=1)

    def _levels(self, raw: Sequence[memoryview], rows: int, out: Floats) -> None:
        packed = np.frombuffer(raw[0], np.uint8).reshape(rows, -1)
        width = self.padded[1]
        if self.bits == 4:
            table = nibbles.OFFSET if self.codebook is None else nibbles.pairs(np.frombuffer(raw[3], "<f4"))
            nibbles.take(table, packed, out)
            return
        nibbles.take(nibbles.PLAIN, np.ascontiguousarray(packed[:, : width // 2]), out)
        upper = packed[:, width // 2 :, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
        out += upper.reshape(rows, width) * np.float32(16) - np.float32(32)

    def _relative(self, raw: Sequence[memoryview], rows: int) -> Floats:
        """The groups' scales, [rows, groups]."""
        if self.relative[1] is F32:
            return np.frombuffer(raw[1], "<f4").reshape(rows, -1)
        codes = np.frombuffer(raw[1], np.uint8).reshape(rows, -1)
        out = np.empty(codes.shape, np.float32)
        widen(codes, F8_E4M3, out)
        return out


class W4A8Dequantiser(Dequantiser):
    """See the module."""

    title = "asym_w4a8_int8"
    formats = ("asym_w4a8_int8",)
    scales = frozenset({RELATIVE, CHANNEL, CODEBOOK, CORRECTION})
    rotates = True

    def read(self, layer: Layer) -> W4A8:
        """The layer; raises DataError where its tensors contradict each other."""
        rows, packed = layer.matrix(I8)
        group = layer.setting("group_size", USUAL_GROUP)
        if type(group) is not int or group < 4 or (16 % group and group % 16):
            layer.refuse(f'has a "group_size" of {str(group)[:20]}', "a divisor or multiple of 16 from 4 on")
        relative, info = layer.side(RELATIVE, F8_E4M3, U8, F32)
        columns = info.shape[-1] * group if info.shape else 0
        bits = packed * 8 // columns if columns else 0
        if info.shape[:-1] != (rows,) or bits not in (4, 6) or bits * columns != packed * 8:
            layer.refuse(f'has a "{RELATIVE}" of shape {list(info.shape)}', f"[{rows}, columns / {group}]")
        if bits == 6 and (columns % 32 or group % 16):
            layer.refuse(f"has {columns} columns of 6 bits in groups of {group}", "columns by 32 in groups by 16")
        channel, channels = layer.side(CHANNEL, F32)
        if channels.shape != (rows,):
            layer.refuse(f'has a "{CHANNEL}" of shape {list(channels.shape)}', f"[{rows}]")
        codebook = self._beside(layer, CODEBOOK, (LEVELS,), F32)
        correction = self._beside(layer, CORRECTION, (columns // group, rows), *SCALE_DTYPES)
        if bits == 6 and (codebook or correction):
            layer.refuse("has codes of 6 bits and a codebook or correction", "neither")
        return W4A8(
            layer.tensor,
            beside(layer),
            (rows, columns),
            (rows, columns),
            column_factor(layer, columns),
            bits,
            group,
            rotation.always(layer, columns),
            (relative, info.dtype),
            channel,
            codebook[0] if codebook else None,
            correction,
        )

    def _beside(self, layer: Layer, leaf: str, shape: tuple[int, ...], *dtypes: DType) -> tuple[str, DType] | None:
        if leaf not in layer.sides:
            return None
        name, info = layer.side(leaf, *dtypes)
        if info.shape != shape:
            layer.refuse(f'has a "{leaf}" of shape {list(info.shape)}', f"{list(shape)}")
        return name, info.dtype


CONTAINER = W4A8Dequantiser()
