"""Whole weights in a LoRA file: the model's own gives way to them, at any strength.

ComfyUI's ``set_weight`` and the norms of diffusers' and Black Forest Labs' control LoRAs are such. Both programs store them in the model as they
are, whatever the strength; with W the model's weight and V the file's, the change is V - W, and a merge takes it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mergetool.adapters.adapter import Change
from mergetool.adapters.dora import WeightRows
from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.values import dense_rows
from mergetool.quant.encoding import ComputedRows, Floats


@dataclass(frozen=True, eq=False)
class WholeRows(ComputedRows):
    """The rows of V - W of one part, float32 [rows, columns]."""

    file: LoraFile
    change: Change
    weight: WeightRows

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def label(self) -> str:
        """The kind of adapter."""
        return self.change.adapter.kind

    def _decode(self, raw: Sequence[memoryview], row: int, rows: int, out: Floats) -> None:
        out[:] = dense_rows(self.file, self.change, row, rows).reshape(out.shape)
        out -= self.weight.rows(row, rows).reshape(out.shape)
