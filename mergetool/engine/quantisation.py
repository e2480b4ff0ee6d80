"""Quantised output: collect a weight in float32, then encode it while the next is collected.

A tensor's scale depends on its largest value, so nothing can be encoded before all of it is known. Its float32 values wait in a buffer, the
largest weight's size, rather than being computed twice: for scaled FP8 that would decode every input twice. Threads pass through the phases of
weights together (fill, with a search: search, encode beside the next one's fill), each waiting for the last job of the phase before.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.ops.blend import moves
from mergetool.ops.movement import Movement
from mergetool.ops.stored import Stored
from mergetool.quant.encoding import Encoding, Floats, Octets
from mergetool.quant.quantiser import PIECE_ROWS, Quantiser, Round
from mergetool.recipe.steps import OutputTensor

SCALE_STEPS = tuple(2.0 ** (eighth / 8) for eighth in range(-2, 8))
"""The factors of ``scale_search`` for the scale by amax. Over an octave FP8's rounding error repeats itself; below 1
the largest values are cut."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a quantised output tensor: rows ``[row, row + rows)``.

    With padding they are ``stored`` rows.
    """

    tensor: OutputTensor
    row: int
    rows: int
    stored: int


def pieces(tensor: OutputTensor, elements: int) -> list[Piece]:
    """Cut a quantised tensor into pieces of about ``elements``.

    Each is of whole tiles of rows; the last has the padding.
    """
    rows, (stored, columns) = tensor.shape[0], padded(tensor)
    height = max(1, elements // columns // PIECE_ROWS) * PIECE_ROWS
    return [Piece(tensor, row, min(height, rows - row), min(height, stored - row)) for row in range(0, rows, height)]


def padded(tensor: OutputTensor) -> tuple[int, int]:
    """The rows and columns that a quantised tensor is stored with."""
    return quantiser_of(tensor).padded((tensor.shape[0], tensor.shape[1]))


def quantiser_of(tensor: OutputTensor) -> Quantiser:
    """The container of a tensor that is quantised."""
    assert tensor.quantiser is not None
    return tensor.quantiser


def capacities(tensors: Sequence[OutputTensor]) -> tuple[int, int]:
    """Elements of the two buffers that quantised tensors take in turn."""
    even, odd = ([tensor.shape[0] * tensor.shape[1] for tensor in tensors[start::2]] for start in (0, 1))
    return max(even, default=0), max(odd, default=0)


class Phases:
    """Lets jobs of a phase begin when every earlier phase's job has ended.

    ``sizes[n]`` is how many phase n has.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._left = list(sizes)
        self._current = 0
        self._stopped = False
        self._changed = threading.Condition()

    def enter(self, phase: int) -> bool:
        """Wait for the phase; False when the run was stopped meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._current >= phase)
            return not self._stopped

    def leave(self, phase: int) -> None:
        """One job of the phase has ended."""
        with self._changed:
            self._left[phase] -= 1
            while self._current < len(self._left) and self._left[self._current] == 0:
                self._current += 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let everyone go."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


class Weights:
    """The float32 values of the two weights whose turn it is.

    One is being encoded, one filled; what is known of their scales is here too.

    Neighbours among ``tensors``, the quantised ones in output order, have different buffers. Filled, searched and encoded by several
    threads, each its own part.
    """

    def __init__(self, tensors: Sequence[OutputTensor]) -> None:
        self._values = [np.empty(elements, np.float32) for elements in capacities(tensors)]
        self._buffer = {tensor.name: i % 2 for i, tensor in enumerate(tensors)}
        self._amax: dict[str, float] = {}
        self._errors: dict[str, dict[int, list[float]]] = {}
        self._lock = threading.Lock()

    def room(self, tensor: OutputTensor, start: int, count: int) -> Floats:
        """The buffer for the values of elements ``[start, start + count)``."""
        return self._values[self._buffer[tensor.name]][start : start + count]

    def note(self, tensor: OutputTensor, largest: float) -> None:
        """Some of the tensor's elements are there, of at most this magnitude."""
        with self._lock:
            self._amax[tensor.name] = max(largest, self._amax.get(tensor.name, 0.0))

    def rows(self, piece: Piece) -> Floats:
        """The true values [rows, columns] of a piece."""
        columns = piece.tensor.shape[1]
        return self.room(piece.tensor, piece.row * columns, piece.rows * columns).reshape(piece.rows, columns)

    def scale(self, tensor: OutputTensor) -> np.float32:
        """The tensor's scale: by its largest value, or of least squared error after a search."""
        scale = quantiser_of(tensor).scale(np.float32(self._amax[tensor.name]))
        searched = self._errors.get(tensor.name)
        if not searched:
            return scale
        sums = [math.fsum(errors) for errors in zip(*searched.values(), strict=True)]
        best = min(range(len(sums)), key=lambda i: (sums[i], SCALE_STEPS[i] != 1))
        return np.float32(scale * np.float32(SCALE_STEPS[best]))

    def search(self, piece: Piece, round_to: Round) -> None:
        """Note the squared error of a piece for every candidate scale."""
        tensor = piece.tensor
        scale = quantiser_of(tensor).scale(np.float32(self._amax[tensor.name]))
        errors = []
        for step in SCALE_STEPS:
            candidate = np.float32(scale * np.float32(step))
            raw = encode(self.rows(piece), piece, candidate, round_to)
            errors.append(squared_error(self.rows(piece), decode(piece, raw, candidate)))
        with self._lock:
            self._errors.setdefault(tensor.name, {})[piece.row] = errors

    def search_gain(self) -> float | None:
        """The squared error of searched weights over that of amax scales; None without a search."""
        best = by_amax = 0.0
        for searched in self._errors.values():
            sums = [math.fsum(errors) for errors in zip(*searched.values(), strict=True)]
            best += min(sums)
            by_amax += sums[SCALE_STEPS.index(1.0)]
        return best / by_amax if by_amax else None


def encode(values: Floats, piece: Piece, scale: np.float32, round_to: Round) -> tuple[Octets, ...]:
    """Encode ``values`` [rows, columns] of a piece, padding included."""
    stored = (piece.stored, padded(piece.tensor)[1])
    if stored != values.shape:
        larger = np.zeros(stored, np.float32)
        larger[: values.shape[0], : values.shape[1]] = values
        values = larger
    return quantiser_of(piece.tensor).encode(values, scale, round_to)


def decode(piece: Piece, raw: Sequence[Octets], scale: np.float32) -> Floats:
    """Decode the bytes of a piece as a reader of the file would."""
    encoding = _encoding(piece.tensor)
    out = np.empty((piece.rows, encoding.width), np.float32)
    encoding.decode(_views(piece, raw, scale), piece.row, piece.rows, out)
    return out


def _steps(piece: Piece, raw: Sequence[Octets], scale: np.float32) -> Floats:
    """The distance between neighbours at each value of a piece, in its shape or one that broadcasts to it."""
    return _encoding(piece.tensor).steps(_views(piece, raw, scale), piece.row, piece.rows)


def _views(piece: Piece, raw: Sequence[Octets], scale: np.float32) -> list[memoryview]:
    """The bytes that a reader would get for the piece's rows."""
    spans = _encoding(piece.tensor).spans(piece.row, piece.rows)
    stored = [np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in raw]
    views = [part.data[: span.size] for part, span in zip(stored, spans, strict=False)]
    if len(spans) > len(raw):
        views.append(memoryview(np.float32(scale).tobytes()))
    return views


def measure(
    piece: Piece, result: Floats, base: Floats, raw: Sequence[Octets], scale: np.float32, nearest: Round
) -> Movement:
    """Measure how storing changed the ``base`` values of a piece's rows.

    They are [rows, columns], as is ``result``, which was stored as ``raw``.

    What the base alone would have been stored as, and half of what distance, is asked of the container with the same scale.
    """
    alone = encode(base, piece, scale, nearest)
    scaled = _encoding(piece.tensor).scaled(_views(piece, raw, scale))
    if scaled is not None:
        movement = moves(result, base, Stored(*scaled), _views(piece, alone, scale)[0])
        if movement is not None:
            return movement
    steps = np.broadcast_to(_steps(piece, alone, scale), (piece.rows, padded(piece.tensor)[1]))[:, : base.shape[1]]
    with np.errstate(over="ignore", invalid="ignore"):
        change = result - base
        kept = decode(piece, raw, scale)
        kept -= decode(piece, alone, scale)
        moved = change != 0
        energy = _dot(change, change)
        if not np.isfinite(energy + _dot(kept, kept)):
            moved &= np.isfinite(change) & np.isfinite(kept)
            change[~moved] = kept[~moved] = 0
            energy = _dot(change, change)
        return Movement(
            int(np.count_nonzero(moved)),
            int(np.count_nonzero(moved & (kept == 0))),
            int(np.count_nonzero(moved & (np.abs(change) < steps / 2))),
            energy,
            _dot(change, kept),
        )


def write(piece: Piece, raw: Sequence[Octets], scale: np.float32, put: Callable[[str, int, memoryview], None]) -> int:
    """Hand a piece's bytes to ``put(name, start, data)``; returns their number.

    With the first piece goes what the tensor has once.
    """
    tensor, written = piece.tensor, 0
    for part, span in zip(raw, _encoding(tensor).spans(piece.row, piece.stored), strict=False):
        put(span.tensor, span.start, np.ascontiguousarray(part).data.cast("B"))
        written += part.nbytes
    if piece.row == 0:
        for name, data in (
            quantiser_of(tensor).constants(tensor.layer, (tensor.shape[0], tensor.shape[1]), scale).items()
        ):
            put(name, 0, memoryview(data))
            written += len(data)
    return written


def _encoding(tensor: OutputTensor) -> Encoding:
    return quantiser_of(tensor).encoding(tensor.layer, (tensor.shape[0], tensor.shape[1]))


def squared_error(values: Floats, stored: Floats) -> float:
    """The sum of squared differences, added in float64."""
    difference = np.subtract(stored, values)
    return _dot(difference, difference)


def _dot(a: Floats, b: Floats) -> float:
    """The dot product of two matrices' elements, added in float64."""
    return float(np.einsum("ij,ij->", a, b, dtype=np.float64))
