"""DoRA: a change that depends on the weight it is added to, row by row.

With W the anchor's values of a part, S the adapter's scaled product and m its magnitudes,

    change = m * (W + S) / (||W + S|| + eps) - W

where the norm is that of an output row (m has a value for every row, as PEFT and kohya-type trainers write it) or of an input channel
over all rows of the module (m is [1, channels]); eps is float32's, 2^-23, which LyCORIS and ComfyUI add. A strength multiplies the
change. This is the definition of the paper (arXiv 2402.09353, equation 5), PEFT's and LyCORIS'. ComfyUI does the same by channels; by
rows it divides by the norm of W alone, so that its weights differ from the trainer's by the change of the norm.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from mergetool.adapters.adapter import Change, is_by_columns
from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.values import factor
from mergetool.arch import Part
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError, NonFiniteError
from mergetool.quant.encoding import ComputedRows, Encoding, Floats
from mergetool.quant.fp8 import widened

EPSILON = 2.0**-23

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class WeightRows:
    """The values of one part of a model, in any storage."""

    checkpoint: Checkpoint
    part: Part

    def rows(self, row: int, count: int) -> Floats:
        """Rows ``[row, row + count)`` of the part, float32 [count, columns]."""
        stored, encoding = self.part.stored, self.part.encoding
        if encoding is not None:
            return encoding.values(self.checkpoint.read, stored.row + row, count)
        size = self.checkpoint.tensors[stored.tensor].row_nbytes
        raw = self.checkpoint.read(stored.tensor, (stored.row + row) * size, count * size)
        return widened(memoryview(raw), self.part.dtype).reshape(count, -1)


class ColumnNorms:
    """The norms of the input channels of W + S over all rows of a module, computed once.

    The first who asks computes them.

    ``pieces`` are the parts that the module holds: one, or q, k and v of a fused one.
    """

    def __init__(self, pieces: Sequence[tuple[WeightRows, Encoding]], channels: int) -> None:
        self._pieces = pieces
        self._channels = channels
        self._lock = threading.Lock()
        self._found: Doubles | None = None

    def get(self) -> Doubles:
        """The norms, float64 [channels]."""
        with self._lock:
            if self._found is None:
                squares = np.zeros(self._channels)
                for weight, change in self._pieces:
                    for row in range(0, change.rows, change.tile_rows):
                        count = min(change.tile_rows, change.rows - row)
                        values = _moved(weight, change, row, count).reshape(count, self._channels, -1)
                        squares += np.square(values).sum(axis=(0, 2))
                self._found = np.sqrt(squares)
            return self._found


@dataclass(frozen=True, eq=False)
class DoraRows(ComputedRows):
    """The rows of a DoRA's change of one part, float32 [rows, columns].

    ``change`` gives the rows of S, ``weight`` those of W. ``magnitudes`` are those of the part's rows, or of the channels where
    ``norms`` are given.
    """

    change: Encoding
    weight: WeightRows
    magnitudes: Floats
    norms: ColumnNorms | None

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def label(self) -> str:
        """The kind of adapter."""
        return "dora"

    @property
    def tile_rows(self) -> int:
        """The rows of a tile of the product."""
        return self.change.tile_rows

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        for first in range(0, rows, self.tile_rows):
            count = min(self.tile_rows, rows - first)
            out[first : first + count] = self._tile(row + first, count)

    def _tile(self, row: int, count: int) -> Doubles:
        moved = _moved(self.weight, self.change, row, count)
        if self.norms is None:
            norms = np.sqrt(np.square(moved).sum(axis=1, keepdims=True))
            factors = self.magnitudes[row : row + count, None] / (norms + EPSILON)
        else:
            channels = self.magnitudes / (self.norms.get() + EPSILON)
            factors = np.repeat(channels, moved.shape[1] // len(channels))[None]
        change: Doubles = factors * moved - self.weight.rows(row, count)
        return change


def dora_rows(
    file: LoraFile, model: Checkpoint, parts: Sequence[tuple[Change, Part]], product: Callable[[Change, Part], Encoding]
) -> dict[str, DoraRows]:
    """The changes of one DoRA adapter by part.

    ``parts`` are all that its module holds, ``product`` makes the rows of S.

    Raises DataError for magnitudes that are neither one a row nor one an input channel, NonFiniteError for NaN among them.
    """
    adapter = parts[0][0].adapter
    key = adapter.tensors["dora_scale"]
    values, shape = factor(file, key), file.checkpoint.tensors[key].shape
    rows, channels = adapter.shape[0], adapter.shape[1] if len(adapter.shape) > 1 else 1
    of_columns = is_by_columns(key, shape, rows)
    wanted = channels if of_columns else rows
    if prod(shape) != wanted or max(shape, default=1) != wanted:
        raise DataError(
            f'"{file.name}": {quoted(key)} has shape {list(shape)}, where [{rows}, 1] for rows or [1, {channels}] for columns '
            "is wanted; the file is damaged or for another model."
        )
    if not np.isfinite(values).all():
        raise NonFiniteError(f'"{file.name}": {quoted(key)} holds NaN or infinity; mend the file, or leave it out.')
    flat = values.reshape(-1)
    pieces = [(WeightRows(model, part), product(change, part)) for change, part in parts]
    norms = ColumnNorms(pieces, channels) if of_columns else None
    found = {}
    for (change, part), (weight, rows_of) in zip(parts, pieces, strict=True):
        mine = flat if of_columns else flat[change.row : change.row + change.rows]
        shape2 = (rows_of.rows, rows_of.width)
        found[part.name] = DoraRows(rows_of.tensor, rows_of.beside, shape2, shape2, None, rows_of, weight, mine, norms)
    return found


def _moved(weight: WeightRows, change: Encoding, row: int, count: int) -> Doubles:
    """Rows of W + S, added in float64."""
    moved = weight.rows(row, count).astype(np.float64)
    moved += change.values(_no_bytes, row, count)
    return moved


def _no_bytes(tensor: str, start: int, size: int) -> bytes:
    raise AssertionError("a change reads its own file")
