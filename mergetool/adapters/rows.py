"""The changes of LoRAs to a part, row by row, through the interface of quantised rows.

Those are the rows of a quantised weight.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod

import numpy as np

from mergetool.adapters.adapter import Change
from mergetool.adapters.dora import WeightRows, dora_rows
from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.values import dense_rows, low_rank
from mergetool.adapters.whole import WholeRows
from mergetool.arch import Anatomy, Part, Slice
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError, NonFiniteError
from mergetool.quant.encoding import ComputedRows, Encoding, Floats

TILE_ROWS = 64
"""Rows of a product that are computed together. How a library adds up the products may depend on their number, so that it
must not depend on the run."""

RECENT = 4
"""Parts whose factors stay in memory: those that are being worked on. At rank 128, 26 MB of a 10240 x 3840 matrix."""


@dataclass(frozen=True)
class ChangeRows(ComputedRows):
    """The rows of one change of any kind, float32 [rows, columns]."""

    file: LoraFile
    change: Change

    @property
    def label(self) -> str:
        """The kind of adapter."""
        return self.change.adapter.kind

    @property
    def is_product(self) -> bool:
        """Whether it is a product of two factors."""
        return self.change.adapter.kind == "lora"

    @property
    def tile_rows(self) -> int:
        """`TILE_ROWS`."""
        return TILE_ROWS

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        out[:] = dense_rows(self.file, self.change, row, rows).reshape(out.shape)


@dataclass(frozen=True, eq=False)
class StackedRows(ComputedRows):
    """The rows of a sum of products, as one: factors side by side, strengths in ``up``."""

    items: tuple[tuple[Fraction, ChangeRows], ...]

    __eq__ = object.__eq__  # Encoding's compares what q, k and v of one fused adapter have in common
    __hash__ = object.__hash__

    @classmethod
    def of(cls, items: Sequence[tuple[Fraction, ChangeRows]]) -> StackedRows:
        """The sum of ``items`` of one shape."""
        first = items[0][1]
        return cls(first.tensor, (), first.shape, first.padded, None, tuple(items))

    @property
    def label(self) -> str:
        """The kind of adapter."""
        return "lora"

    @property
    def tile_rows(self) -> int:
        """`TILE_ROWS`."""
        return TILE_ROWS

    def factors(self) -> tuple[Floats, Floats]:
        """``up`` [all rows, ranks] with every strength and scale, and ``down`` [ranks, columns].

        They are multiplied in float64 and rounded once.

        Kept for the few parts that are in use. Raises NonFiniteError for a factor with NaN or infinity.
        """
        return _RECENT.get(self)

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        up, down = self.factors()
        np.matmul(up[row : row + rows], down, out=out)


class _Recent:
    """The factors of the stacks used last; each is read once, by the first thread that needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[StackedRows, tuple[Floats, Floats]] = OrderedDict()

    def get(self, stack: StackedRows) -> tuple[Floats, Floats]:
        with self._lock:
            found = self._found.pop(stack, None)
            if found is None:
                while len(self._found) >= RECENT:
                    self._found.popitem(last=False)
                found = _read(stack)
            self._found[stack] = found
            return found


_RECENT = _Recent()


def _read(stack: StackedRows) -> tuple[Floats, Floats]:
    ups, downs = [], []
    for strength, rows in stack.items:
        found = low_rank(rows.file, rows.change, scaled=False)
        assert found is not None
        for factor in found:
            if not np.isfinite(factor).all():
                raise NonFiniteError(
                    f'"{rows.file.name}": the factors of {quoted(rows.change.adapter.module)} hold NaN or infinity; '
                    "mend the file, or leave it out."
                )
        ups.append((found[0] * (float(strength) * np.float64(rows.change.adapter.scale))).astype(np.float32))
        downs.append(found[1])
    return np.concatenate(ups, axis=1), np.concatenate(downs)


def anatomy_of(file: LoraFile, model: Anatomy, checkpoint: Checkpoint | None = None) -> Anatomy:
    """The parts of ``model`` that ``file`` changes, with the change as their values.

    ``checkpoint`` is the model's own, which the change of a DoRA or a whole weight depends on. Raises DataError for a change that cannot be
    added: of a part that is changed twice, or one of those without the checkpoint; and what `dora_rows` raises.
    """
    parts: dict[str, Part] = {}
    doras: dict[int, list[tuple[Change, Part]]] = {}
    for name, changes in file.changes.items():
        part = model.parts[name]
        if len(changes) > 1:
            modules = " and ".join(quoted(change.adapter.module) for change in changes)
            raise DataError(
                f'"{file.name}" changes {quoted(name)} {len(changes)} times, by {modules}, where once is wanted: programs differ '
                "in which they take, so get the LoRA with one of them."
            )
        if checkpoint is None and (changes[0].adapter.kind == "whole" or "dora_scale" in changes[0].adapter.tensors):
            what = "a whole weight" if changes[0].adapter.kind == "whole" else "a DoRA"
            raise DataError(
                f'"{file.name}": {quoted(name)} is changed by {what}, whose change depends on the weight; add it to a model.'
            )
        if "dora_scale" in changes[0].adapter.tensors:
            doras.setdefault(id(changes[0].adapter), []).append((changes[0], part))
        rows: Encoding = change_rows(file, changes[0], part)
        if changes[0].adapter.kind == "whole":
            assert checkpoint is not None
            rows = WholeRows(
                rows.tensor, rows.beside, rows.shape, rows.padded, None, file, changes[0], WeightRows(checkpoint, part)
            )
        parts[name] = _changed(part, rows)
    for held in doras.values():
        assert checkpoint is not None
        for name, rows in dora_rows(file, checkpoint, held, lambda change, part: _product(file, change, part)).items():
            parts[name] = _changed(model.parts[name], rows)
    return Anatomy(model.family, model.layout, "", parts)


def change_rows(file: LoraFile, change: Change, part: Part) -> ChangeRows:
    """The rows that ``change`` adds to ``part``, a DoRA's before its magnitudes."""
    shape = (part.shape[0] if part.shape else 1, prod(part.shape[1:]))
    stored = tuple(change.adapter.tensors.values())
    return ChangeRows(stored[0], stored[1:], shape, shape, None, file, change)


def _product(file: LoraFile, change: Change, part: Part) -> Encoding:
    """The same, with factors that are kept where it is a product of two."""
    rows = change_rows(file, change, part)
    return StackedRows.of([(Fraction(1), rows)]) if rows.is_product else rows


def _changed(part: Part, rows: Encoding) -> Part:
    return Part(part.name, part.shape, F32, Slice(rows.tensor, 0, rows.padded[0]), rows)
