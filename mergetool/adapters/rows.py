"""What a LoRA adds to a part, row by row: the same interface that a quantised weight is read through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NoReturn

import numpy as np

from mergetool.adapters.adapter import Change
from mergetool.adapters.reading import LoraFile
from mergetool.adapters.values import dense_rows
from mergetool.arch import Anatomy, Part, Slice
from mergetool.checkpoint.dtypes import F32, DType
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError
from mergetool.quant.encoding import Encoding, Floats, Span, floats

TILE_ROWS = 64
"""Rows of a product that are computed together. How a library adds up the products may depend on their number, so that it
must not depend on the run."""


@dataclass(frozen=True)
class ChangeRows(Encoding):
    """The rows of a change of any kind, float32 [rows, columns]. It holds what its file says, so ``spans`` are none."""

    file: LoraFile
    change: Change

    @property
    def label(self) -> str:
        """The kind of adapter."""
        return self.change.adapter.kind

    @property
    def tile_rows(self) -> int:
        """`TILE_ROWS`."""
        return TILE_ROWS

    def steps(self, raw: Sequence[memoryview], row: int, rows: int) -> Floats:
        """None: a change is not rounded to codes."""
        return np.zeros((rows, 1), np.float32)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        return ()

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        out[:] = dense_rows(self.file, self.change, row, rows).reshape(out.shape)


@dataclass(frozen=True)
class ProductRows(ChangeRows):
    """The rows of a low-rank change: those of ``up`` [rows, rank] times ``down`` [rank, columns], times the scale."""

    up: tuple[str, DType, int]  # tensor, dtype, first row
    down: tuple[str, DType]

    @property
    def rank(self) -> int:
        """The inner width."""
        rank = self.change.adapter.rank
        assert rank is not None
        return rank

    def factors(self, raw: Sequence[memoryview], rows: int) -> tuple[Floats, Floats]:
        """``up`` [rows, rank] with the scale in it, and ``down`` [rank, columns], from the bytes of `spans`."""
        up = floats(raw[0], self.up[1]).reshape(rows, self.rank)
        if self.change.adapter.scale != 1:
            up = (up * np.float64(self.change.adapter.scale)).astype(np.float32)
        return up, floats(raw[1], self.down[1]).reshape(self.rank, self.width)

    def _spans(self, row: int, rows: int) -> tuple[Span, ...]:
        tensor, dtype, first = self.up
        width = self.rank * dtype.itemsize
        down, down_dtype = self.down
        return (
            Span(tensor, (first + row) * width, rows * width),
            Span(down, 0, self.rank * self.width * down_dtype.itemsize),
        )

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        up, down = self.factors(raw, rows)
        np.matmul(up, down, out=out)


def anatomy_of(file: LoraFile, model: Anatomy) -> Anatomy:
    """The parts of ``model`` that ``file`` changes, with the change as their values.

    Raises DataError for a change that cannot be added: DoRA, whose change depends on the weight, two changes of one part, and
    another shape than the model's.
    """
    parts: dict[str, Part] = {}
    for name, changes in file.changes.items():
        part = model.parts[name]
        if len(changes) > 1:
            _refuse(file, name, f"is changed {len(changes)} times", "once; get one LoRA without the others in it")
        change = changes[0]
        if "dora_scale" in change.adapter.tensors:
            _refuse(file, name, "is a DoRA, whose change is no sum", "a LoRA; merge it where it was trained")
        columns = prod(part.shape[1:])
        if (change.rows, prod(change.adapter.shape[1:])) != (part.shape[0], columns):
            found = [change.rows, *change.adapter.shape[1:]]
            _refuse(file, name, f"has a change of shape {found}", f"the model's {list(part.shape)}")
        encoding = _rows_of(file, change, (part.shape[0], columns))
        stored = next(iter(change.adapter.tensors.values()))
        parts[name] = Part(name, part.shape, F32, Slice(stored, 0, part.shape[0]), encoding)
    return Anatomy(model.family, model.layout, "", parts)


def _rows_of(file: LoraFile, change: Change, shape: tuple[int, int]) -> ChangeRows:
    roles: Mapping[str, str] = change.adapter.tensors
    stored = tuple(roles.values())
    info = {role: file.checkpoint.tensors[name] for role, name in roles.items()}
    plain = change.adapter.kind == "lora" and "mid" not in roles
    if plain and all(one.dtype.blendable and one.dtype.bits > 8 for one in info.values()):
        up, down = (roles["up"], info["up"].dtype, change.row), (roles["down"], info["down"].dtype)
        return ProductRows(stored[0], stored[1:], shape, shape, None, file, change, up, down)
    return ChangeRows(stored[0], stored[1:], shape, shape, None, file, change)


def _refuse(file: LoraFile, part: str, found: str, wanted: str) -> NoReturn:
    raise DataError(f'"{file.name}": {quoted(part)} {found}, where {wanted} is wanted.')
