"""SDNQ: integers of 8 or 4 bits with scales of rows or of groups of columns.

    w = q * scale                    int8, and int4 less 8
    w = zero_point + q * scale       uint8 and uint4
    w = that + up @ down             where there is a low rank: float64 is rounded once

4-bit codes lie in one list of bytes, the even element in the low nibble. A config.json with SDNQ's ``quantization_config`` must be beside the file, since
nothing else tells a rotated weight or another width of codes from these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np

from mergetool.checkpoint.dtypes import BY_CODE, DType
from mergetool.quant import nibbles
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import SCALE_DTYPES, Encoding, Floats, Layer, Span, beside, floats
from mergetool.quant.spellings import SCALE

I8, U8 = BY_CODE["I8"], BY_CODE["U8"]
ZERO, UP, DOWN = "sdnq_zero_point", "svd_up", "svd_down"
PLAIN, PACKED = ("int8", "uint8"), ("int4", "uint4")
UNREAD = ("use_hadamard", "use_codebook", "use_codebook_scale", "use_quantized_matmul", "use_dynamic_quantization")
PER_MODULE = ("modules_dtype_dict", "modules_quant_config")

Numbers = tuple[str, DType]


@dataclass(frozen=True)
class Sdnq(Encoding):
    """Codes [N, K] of ``kind`` with ``scale`` and ``zero`` [N, K/group], and two factors."""

    kind: str
    group: int
    scale: Numbers
    zero: Numbers | None
    up: Numbers | None
    down: Numbers | None
    rank: int

    @property
    def label(self) -> str:
        """Codes, groups and rank."""
        extent = "rows" if self.group == self.padded[1] else f"groups of {self.group}"
        return f"SDNQ {self.kind} by {extent}" + (f" and rank {self.rank}" if self.rank else "")

    @property
    def float_scales(self) -> tuple[tuple[str, DType, int], ...]:
        """All of them."""
        return ((*self.scale, prod(self.padded) // self.group),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        columns, each = self.padded[1], self.padded[1] // self.group
        per_byte = 2 if self.kind in PACKED else 1
        spans = [Span(self.tensor, row * columns // per_byte, rows * columns // per_byte)]
        for one, count in ((self.scale, each), (self.zero, each), (self.up, self.rank)):
            if one is not None:
                size = count * one[1].itemsize
                spans.append(Span(one[0], row * size, rows * size))
        if self.down is not None:
            spans.append(Span(self.down[0], 0, self.rank * columns * self.down[1].itemsize))
        return tuple(spans)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        if self.kind in PACKED:
            table = nibbles.OFFSET if self.kind == "int4" else nibbles.PLAIN
            nibbles.take(table, np.frombuffer(raw[0], np.uint8).reshape(rows, -1), out)
        else:
            np.copyto(out, np.frombuffer(raw[0], np.int8 if self.kind == "int8" else np.uint8).reshape(rows, -1))
        groups = out.reshape(rows, -1, self.group)
        groups *= floats(raw[1], self.scale[1]).reshape(rows, -1, 1)
        if self.zero is not None:
            groups += floats(raw[2], self.zero[1]).reshape(rows, -1, 1)
        if self.up is not None and self.down is not None:
            up = floats(raw[-2], self.up[1]).reshape(rows, -1).astype(np.float64)
            exact = up @ floats(raw[-1], self.down[1]).reshape(self.rank, -1).astype(np.float64)
            exact += out
            out[:] = exact

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The scale."""
        return np.repeat(np.abs(floats(raw[1], self.scale[1]).reshape(rows, -1)), self.group, axis=1)


class SdnqDequantiser(Dequantiser):
    """See the module."""

    title = "SDNQ"
    method = "sdnq"
    beside_codes: Mapping[str, str] = MappingProxyType({"scale": SCALE, "zero_point": ZERO, UP: UP, DOWN: DOWN})

    def unread(self, config: Mapping[str, Any]) -> str | None:
        """Rotations, codebooks, transposed codes, and choices by module."""
        found = next((key for key in (*UNREAD, *PER_MODULE) if config.get(key)), None)
        if found is not None:
            return f'"{found}"'
        kind = config.get("weights_dtype")
        return None if kind in (*PLAIN, *PACKED) else f"weights of {str(kind)[:20]}"

    def claims(self, layer: Layer) -> bool:
        """The config names it."""
        return layer.file.get("quant_method") == self.method and layer.weight.dtype in (I8, U8)

    def read(self, layer: Layer) -> Sdnq:
        """The layer; raises DataError where its tensors contradict each other or the config."""
        kind = layer.file.get("weights_dtype")
        scale, info = layer.side(SCALE, *SCALE_DTYPES)
        rows = info.shape[0] if info.shape else 0
        stored, dtype = layer.weight.shape, I8 if kind == "int8" else U8
        count = layer.weight.numel * (2 if kind in PACKED else 1)
        ranks = (1,) if kind in PACKED else (2, 3)
        if not rows or count % rows or layer.weight.dtype is not dtype or len(stored) not in ranks or 0 in stored:
            layer.refuse(f"has a weight of {layer.weight.dtype.code} {list(stored)}", f"{kind} codes of {rows} rows")
        columns = count // rows
        groups = info.numel // rows
        if info.shape not in ((rows, 1), (rows, groups, 1)) or columns % groups or columns % 2:
            layer.refuse(f"has a scale of shape {list(info.shape)}", f"[{rows}, 1] or [{rows}, groups, 1]")
        if len(stored) > 1 and stored != (
            (rows, columns) if info.shape == (rows, 1) else (rows, groups, columns // groups)
        ):
            layer.refuse(f"has a weight of {list(stored)} beside a scale of {list(info.shape)}", "the same groups")
        if (ZERO in layer.sides) != str(kind).startswith("u"):
            layer.refuse(f"has codes of {kind}", "zero points beside uint codes, and none beside others,")
        zero = self._beside(layer, ZERO, info.shape)
        rank = layer.sides[UP][1].shape[-1] if UP in layer.sides and layer.sides[UP][1].shape else 0
        up, down = self._beside(layer, UP, (rows, rank)), self._beside(layer, DOWN, (rank, columns))
        if (up is None) != (down is None):
            layer.refuse("has one factor of a low rank", "both")
        shape = rows, columns
        return Sdnq(
            *(layer.tensor, beside(layer), shape, shape, None, str(kind), columns // groups),
            *((scale, info.dtype), zero, up, down, rank),
        )

    def _beside(self, layer: Layer, leaf: str, shape: tuple[int, ...]) -> Numbers | None:
        if leaf not in layer.sides:
            return None
        name, info = layer.side(leaf, *SCALE_DTYPES)
        if info.shape != shape or 0 in shape:
            layer.refuse(f'has "{name}" of shape {list(info.shape)}', f"{list(shape)}")
        return name, info.dtype


CONTAINER = SdnqDequantiser()
