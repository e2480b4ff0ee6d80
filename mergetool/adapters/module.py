"""One module of a LoRA as stored: its tensors by role, in their own dtypes, and the scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergetool.adapters.adapter import Adapter, Change, ChangeKind, is_by_columns
from mergetool.adapters.lora_file import LoraFile
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError, NonFiniteError
from mergetool.ops.tensors import TORCH, as_tensor

ROWS = {"lora": ("up",), "loha": ("w1_a", "w2_a"), "full": ("diff", "diff_b"), "whole": ("set_weight",)}
"""Roles whose tensors have the rows of the change, by kind."""


@dataclass(frozen=True, slots=True)
class StoredModule:
    """The ``tensors`` of an adapter by role.

    Of a LoRA they are ``up`` [out, rank] and ``down`` [rank, in]. ``scale`` multiplies the product.
    """

    kind: ChangeKind
    tensors: Mapping[str, Tensor]
    rank: int | None
    scale: float

    @property
    def up(self) -> Tensor:
        """[out, rank]."""
        return self.tensors["up"]

    @property
    def down(self) -> Tensor:
        """[rank, in]."""
        return self.tensors["down"]

    @property
    def rows(self) -> int:
        """The rows of the change, of any kind that has them."""
        return next(len(self.tensors[role]) for role in ROWS[self.kind] if role in self.tensors)

    @property
    def is_plain(self) -> bool:
        """Whether it is two factors and nothing else."""
        return self.kind == "lora" and self.tensors.keys() == {"up", "down"}

    @property
    def is_by_columns(self) -> bool:
        """Whether it is a DoRA whose magnitudes are those of input channels."""
        scale = self.tensors.get("dora_scale")
        return scale is not None and self.kind in ROWS and len(scale) == 1 != len(self.tensors[ROWS[self.kind][0]])

    @property
    def what(self) -> str:
        """The module in words, for messages."""
        if self.kind == "lora":
            return "a DoRA" if "dora_scale" in self.tensors else "a LoCon" if "mid" in self.tensors else "a LoRA"
        return {"full": "a whole difference", "whole": "a whole weight", "loha": "a LoHa", "lokr": "a LoKr"}[self.kind]

    def with_(self, *, scale: float | None = None, rank: int | None = None, **tensors: Tensor) -> StoredModule:
        """The same with other tensors."""
        return replace(
            self,
            tensors={**self.tensors, **tensors},
            scale=self.scale if scale is None else scale,
            rank=self.rank if rank is None else rank,
        )


def read(file: LoraFile, adapter: Adapter) -> StoredModule:
    """All of an adapter, bit for bit. Raises NonFiniteError for NaN or infinity, DataError for a dtype that is no float."""
    tensors = {}
    for role, key in adapter.tensors.items():
        info = file.checkpoint.tensors[key]
        if info.dtype not in TORCH:
            raise DataError(f'"{file.name}": {quoted(key)} is stored as {info.dtype.code}, where a float is wanted.')
        raw = file.checkpoint.read(key)
        tensor = as_tensor(memoryview(raw), info.dtype).clone().view(info.shape)
        if not torch.isfinite(tensor.float()).all():
            raise NonFiniteError(f'"{file.name}": {quoted(key)} holds NaN or infinity; mend the file, or leave it out.')
        tensors[role] = _magnitudes(file, adapter, tensor) if role == "dora_scale" else tensor
    return StoredModule(adapter.kind, tensors, adapter.rank, adapter.scale)


def _magnitudes(file: LoraFile, adapter: Adapter, stored: Tensor) -> Tensor:
    """A DoRA's magnitudes as ComfyUI and LyCORIS have them: [out, 1] of rows, as they are of input channels. Raises DataError for neither."""
    key, (rows, *others) = adapter.tensors["dora_scale"], adapter.shape
    columns = is_by_columns(key, tuple(stored.shape), rows)
    wanted = others[0] if columns else rows
    if stored.numel() != wanted:
        raise DataError(
            f'"{file.name}": {quoted(key)} has {stored.numel()} magnitudes, where {wanted} are wanted; the file is damaged.'
        )
    return stored if columns else stored.reshape(rows, *(1 for _ in others))


def reordered(module: StoredModule, changes: Sequence[Change], order: Sequence[str]) -> StoredModule | None:
    """A fused module with the rows of its parts in another ``order``, bit for bit.

    ``changes`` are those of all its parts, in its own order. None for one of another order whose factors have no rows: a LoKr, a Tucker core.
    """
    places = {change.part: change for change in changes}
    if list(places) == list(order):
        return module
    if module.kind not in ROWS or any(role.startswith(("t1", "t2", "mid")) for role in module.tensors):
        return None
    rows = torch.cat([torch.arange(places[part].row, places[part].row + places[part].rows) for part in order])
    of_rows = {*ROWS[module.kind], *(() if module.is_by_columns else ("dora_scale",))}
    return replace(
        module, tensors={role: held[rows] if role in of_rows else held for role, held in module.tensors.items()}
    )


def rows(module: StoredModule, change: Change) -> StoredModule | None:
    """The module of one part of a fused one, bit for bit.

    None where its factors have no rows to take: a LoKr, a DoRA by columns.
    """
    if module.kind not in ROWS or any(role.startswith(("t1", "t2", "mid")) for role in module.tensors):
        return None
    taken = slice(change.row, change.row + change.rows)
    tensors = dict(module.tensors)
    for role in ROWS[module.kind]:
        if role in tensors:
            tensors[role] = tensors[role][taken].contiguous()
    if "dora_scale" in tensors:
        magnitudes = tensors["dora_scale"]
        if module.is_by_columns:
            return None
        tensors["dora_scale"] = magnitudes[taken].contiguous()
    return replace(module, tensors=tensors)
