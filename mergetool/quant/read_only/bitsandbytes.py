"""bitsandbytes: NF4 and FP4 by blocks of consecutive elements, and LLM.int8 by rows.

    w = level[code] * absmax[block]           4 bits, the earlier element in a byte's high nibble
    absmax = map[code] * nested_absmax[block of absmax] + offset     where it is quantised again ("double quantisation")
    w = q * SCB * (1 / 127)                   int8, in that order

Blocks do not end with rows. The JSON of sizes is the tensor ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from mergetool.checkpoint import strict_json
from mergetool.checkpoint.dtypes import BY_CODE, F32
from mergetool.quant import nibbles
from mergetool.quant.dequantiser import Dequantiser
from mergetool.quant.encoding import Encoding, Floats, Layer, Span, beside

I8, U8 = BY_CODE["I8"], BY_CODE["U8"]
KINDS: Mapping[str, str] = {"bitsandbytes__nf4": "nf4", "bitsandbytes__fp4": "fp4"}
ABSMAX, LEVELS, NESTED, MAP, ROWS, PLACES = (
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "SCB",
    "weight_format",
)
IN_127THS = np.float32(1 / 127)


@dataclass(frozen=True)
class Nested:
    """The second quantisation of the blocks' scales: its tensors, block and offset."""

    absmax: str
    table: str
    block: int
    offset: float


@dataclass(frozen=True)
class FourBits(Encoding):
    """Packed codes of consecutive elements, 16 ``levels``, and ``absmax`` of each ``block``."""

    kind: str
    levels: str
    absmax: str
    block: int
    nested: Nested | None

    @property
    def label(self) -> str:
        """Kind and block."""
        twice = ", scales quantised too" if self.nested else ""
        return f"bitsandbytes {self.kind} by blocks of {self.block}{twice}"

    @property
    def float_scales(self) -> tuple[tuple[str, Any, int], ...]:
        """The blocks', or those of their blocks."""
        count = -(-prod(self.padded) // self.block)
        if self.nested is None:
            return ((self.absmax, F32, count),)
        return ((self.nested.absmax, F32, -(-count // self.nested.block)),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        begin, end = row * self.padded[1], (row + rows) * self.padded[1]
        first, last = begin // self.block, -(-end // self.block)
        codes = Span(self.tensor, begin // 2, -(-end // 2) - begin // 2)
        levels = Span(self.levels, 0, 64)
        if self.nested is None:
            return codes, levels, Span(self.absmax, first * 4, (last - first) * 4)
        outer, outmost = first // self.nested.block, -(-last // self.nested.block)
        return (
            *(codes, levels, Span(self.absmax, first, last - first)),
            *(Span(self.nested.absmax, outer * 4, (outmost - outer) * 4), Span(self.nested.table, 0, 1024)),
        )

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        begin, end = row * self.padded[1], (row + rows) * self.padded[1]
        packed = np.frombuffer(raw[0], np.uint8)
        values = np.empty(2 * len(packed), np.float32)
        nibbles.take(nibbles.pairs(np.frombuffer(raw[1], "<f4"), high_first=True), packed, values)
        np.multiply(values[begin % 2 :][: end - begin], self._each(raw, begin, end), out=out.reshape(-1))

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """The mean gap of levels times the block's scale."""
        levels = np.frombuffer(raw[1], "<f4")
        gap = np.float32((levels.max() - levels.min()) / 15)
        each = self._each(raw, row * self.padded[1], (row + rows) * self.padded[1])
        return each.reshape(rows, -1) * gap

    def _each(self, raw: Sequence[memoryview], begin: int, end: int) -> Floats:
        """The scale of every element ``[begin, end)``."""
        first = begin // self.block
        if self.nested is None:
            scales = np.frombuffer(raw[2], "<f4")
        else:
            codes, outer = np.frombuffer(raw[2], np.uint8), np.frombuffer(raw[3], "<f4")
            blocks = np.arange(first, first + len(codes)) // self.nested.block - first // self.nested.block
            scales = np.frombuffer(raw[4], "<f4")[codes] * outer[blocks] + np.float32(self.nested.offset)
        return np.repeat(scales, self.block)[begin - first * self.block :][: end - begin]


@dataclass(frozen=True)
class LlmInt8(Encoding):
    """Integers [N, K] and the largest magnitude of each row."""

    scale: str

    @property
    def label(self) -> str:
        """Container."""
        return "bitsandbytes int8 by rows"

    @property
    def float_scales(self) -> tuple[tuple[str, Any, int], ...]:
        """The rows'."""
        return ((self.scale, F32, self.padded[0]),)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        return Span(self.tensor, row * self.padded[1], rows * self.padded[1]), Span(self.scale, row * 4, rows * 4)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        np.multiply(np.frombuffer(raw[0], np.int8).reshape(rows, -1), np.frombuffer(raw[1], "<f4")[:, None], out=out)
        out *= IN_127THS

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """A 127th of the row's largest magnitude."""
        return np.frombuffer(raw[1], "<f4")[:, None] * IN_127THS


class BitsAndBytes(Dequantiser):
    """See the module."""

    title = "bitsandbytes"
    between = frozenset({"quant_state"})
    scales = frozenset({*KINDS, ABSMAX, LEVELS, NESTED, MAP, ROWS, PLACES})

    def claims(self, layer: Layer) -> bool:
        """Its names are its own."""
        return bool(self.scales & layer.sides.keys())

    def read(self, layer: Layer) -> Encoding:
        """The layer; raises DataError where its tensors contradict each other."""
        if ROWS in layer.sides:
            return _int8(layer)
        stated = next((leaf for leaf in KINDS if leaf in layer.sides), None)
        if stated is None:
            layer.refuse("has codes of bitsandbytes and no quant_state", "the JSON of their sizes")
        return _four_bits(layer, KINDS[stated], _state(layer, layer.sides[stated][0]))


def _int8(layer: Layer) -> LlmInt8:
    rows, columns = shape = layer.matrix(I8)
    scale, info = layer.side(ROWS, F32)
    if info.shape != (rows,):
        layer.refuse(f'has an "{ROWS}" of shape {list(info.shape)}', f"[{rows}]")
    if PLACES in layer.sides:
        name, _ = layer.side(PLACES, U8)
        if any(layer.read(name)):
            layer.refuse(f'has a "{PLACES}" of another order than rows', "rows (0)")
    return LlmInt8(layer.tensor, beside(layer), shape, (rows, columns), None, scale)


def _state(layer: Layer, name: str) -> Mapping[str, Any]:
    try:
        state = strict_json.loads(layer.read(name))
    except ValueError:
        state = None
    if not isinstance(state, dict):
        layer.refuse("has a quant_state that is no JSON object", "the sizes of its codes")
    return state


def _four_bits(layer: Layer, kind: str, state: Mapping[str, Any]) -> FourBits:
    shape, block = state.get("shape"), state.get("blocksize")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        layer.refuse(f"is of shape {str(shape)[:40]} by its quant_state", "rows and columns")
    if type(block) is not int or block < 2 or block % 2 or state.get("quant_type") != kind:
        layer.refuse(f"has blocks of {str(block)[:20]} and type {str(state.get('quant_type'))[:20]!r}", kind)
    rows, columns = shape
    count = rows * columns
    if layer.weight.dtype is not U8 or layer.weight.numel != -(-count // 2):
        layer.refuse(
            f"has {layer.weight.nbytes} bytes of codes in {layer.weight.dtype.code}", f"{-(-count // 2)} in U8"
        )
    blocks = -(-count // block)
    levels = _list(layer, LEVELS, 16)
    if NESTED not in layer.sides:
        return FourBits(
            *(layer.tensor, beside(layer), (rows, columns), (rows, columns), None),
            *(kind, levels, _list(layer, ABSMAX, blocks), block, None),
        )
    outer, offset = state.get("nested_blocksize"), state.get("nested_offset")
    if type(outer) is not int or outer < 1 or not isinstance(offset, int | float):
        layer.refuse('has no "nested_blocksize" or "nested_offset" in its quant_state', "both")
    nested = Nested(_list(layer, NESTED, -(-blocks // outer)), _list(layer, MAP, 256), outer, float(offset))
    absmax, info = layer.side(ABSMAX, U8)
    if info.shape != (blocks,):
        layer.refuse(f'has an "{ABSMAX}" of shape {list(info.shape)}', f"[{blocks}]")
    return FourBits(
        *(layer.tensor, beside(layer), (rows, columns), (rows, columns), None),
        *(kind, levels, absmax, block, nested),
    )


def _list(layer: Layer, leaf: str, size: int) -> str:
    """The name of a list of so many floats beside the weight."""
    name, info = layer.side(leaf, F32)
    if info.shape != (size,):
        layer.refuse(f'has a "{leaf}" of shape {list(info.shape)}', f"[{size}]")
    return name


CONTAINER = BitsAndBytes()
