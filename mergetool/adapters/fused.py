"""Join the parts of a fused tensor to one pair of factors, and take them apart. Such parts are q, k and v of a block.

Apart, ``up`` [3d, r] is cut into three and all keep ``down``; block-diagonal factors, which only `together` makes, lose the columns that
are zero for them. Together, three of one ``down`` are put under each other again, and others become block-diagonal:

    up = diag(up_q, up_k, up_v),  down = [down_q; down_k; down_v],  rank = r_q + r_k + r_v

All of it moves bits and rounds none, unless the three have different scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergetool.adapters.formats import format_for, module_name
from mergetool.adapters.module import StoredModule
from mergetool.arch import Anatomy, Family
from mergetool.checkpoint.names import quoted
from mergetool.errors import DataError


def together(parts: Sequence[StoredModule | None], rows: Sequence[int]) -> tuple[StoredModule, float]:
    """Join parts in row order to one module.

    Returns it with the relative error of rounding. A part is None where it is not changed.

    ``rows`` is how many each has. Scales that differ are folded into ``up``: all but the first one's.
    """
    there = [part for part in parts if part is not None]
    first = there[0]
    if not first.is_plain:
        return _stacked(parts, rows, first), 0.0
    same = len(there) == len(parts) and all(
        part.scale == first.scale and part.down.dtype == first.down.dtype and _same(part.down, first.down)
        for part in there
    )
    if same and len({part.up.dtype for part in there}) == 1:
        return first.with_(up=torch.cat([part.up for part in there])), 0.0
    up_dtype, down_dtype = (_widest([part.tensors[role].dtype for part in there]) for role in ("up", "down"))
    rank = sum(len(part.down) for part in there)
    up = torch.zeros(sum(rows), rank, dtype=up_dtype)
    row, column, exact, lost = 0, 0, 0.0, 0.0
    for part, count in zip(parts, rows, strict=True):
        row += count
        if part is None:
            continue
        wanted = part.up.double() * (part.scale / first.scale) if part.scale != first.scale else part.up.double()
        stored = wanted.to(up_dtype)
        up[row - count : row, column : column + len(part.down)] = stored
        exact += float(wanted.square().sum())
        lost += float((stored.double() - wanted).square().sum())
        column += len(part.down)
    down = torch.cat([part.down.to(down_dtype) for part in there])
    return first.with_(up=up, down=down, rank=rank), (lost / exact) ** 0.5 if exact else 0.0


def _stacked(parts: Sequence[StoredModule | None], rows: Sequence[int], first: StoredModule) -> StoredModule:
    """Whole differences or weights under each other; a part that is not changed has zeros."""
    ((role, held),) = first.tensors.items()
    dtype = _widest([part.tensors[role].dtype for part in parts if part is not None])
    stacked = [
        torch.zeros(count, *held.shape[1:], dtype=dtype) if part is None else part.tensors[role].to(dtype)
        for part, count in zip(parts, rows, strict=True)
    ]
    return replace(first, tensors={role: torch.cat(stacked)})


def joined(tensors: Mapping[str, Tensor], family: Family, model: Anatomy | None) -> dict[str, Tensor]:
    """Join LoRAs of parts that the format's layout stores as one tensor.

    Programs know no module that is a part alone. The format is the default one. Raises DataError where only a ``model`` tells how many rows a part
    has.
    """
    joined: dict[str, Tensor] = {}
    done: set[str] = set()
    form = format_for(family)
    layout = form.layout_of(family)
    for name, tensor in tensors.items():
        module = name.removeprefix(form.prefix).removesuffix(form.down).removesuffix(form.up).removesuffix(".alpha")
        pieces = family.pieces(f"{module}.weight", layout)
        if len(pieces) < 2:
            joined[name] = tensor
            continue
        stored = family.stored_name(pieces[0], layout)
        if stored in done:
            continue
        done.add(stored)
        parts = {piece: held for piece in pieces if (held := _of(tensors, piece, family)) is not None}
        whole, _ = together([parts.get(piece) for piece in pieces], rows_of(family, pieces, parts, model))
        down, up = form.factors(module_name(stored))
        joined |= {down: whole.down, up: whole.up}
        if whole.scale != 1:
            joined[form.key(module_name(stored), "lora", "alpha")] = torch.tensor(whole.scale * len(whole.down))
    return joined


def _of(tensors: Mapping[str, Tensor], part: str, family: Family) -> StoredModule | None:
    """The LoRA of a part, None where there is none."""
    form, module = format_for(family), module_name(part)
    down, up = form.factors(module)
    if down not in tensors:
        return None
    rank = len(tensors[down])
    alpha = tensors.get(form.key(module, "lora", "alpha"))
    return StoredModule(
        "lora", {"down": tensors[down], "up": tensors[up]}, rank, 1.0 if alpha is None else float(alpha) / rank
    )


def rows_of(
    family: Family, pieces: Sequence[str], parts: Mapping[str, StoredModule], model: Anatomy | None
) -> list[int]:
    """The rows of each piece of a fused tensor, of which ``parts`` are changed.

    They are those of a piece's own factors, of the ``model``, or what the table says from the columns or rows of others. Raises DataError where
    only a model tells.
    """
    like = next(iter(parts.values()))
    columns = like.down.shape[1] if like.is_plain else None
    known = {piece: one.rows for piece, one in parts.items()}
    if model is not None:
        known = {piece: model.parts[piece].shape[0] for piece in pieces if piece in model.parts} | known
    rows = []
    for piece in pieces:
        count = known.get(piece) or family.rows_by_columns(piece, columns) or family.rows_beside(piece, known)
        if count is None:
            raise DataError(
                f"{quoted(next(iter(parts)))} is changed without {quoted(piece)}, with which it is one tensor here; how many rows that has, only the "
                "model tells: name it with `model`."
            )
        rows.append(count)
    return rows


def apart(module: StoredModule, slices: Sequence[StoredModule]) -> list[StoredModule | None]:
    """Cut a fused LoRA into ``slices`` of its rows, each without foreign columns.

    Foreign columns are another slice's. None stands for a slice of which nothing is left.
    """
    if not module.is_plain or len(slices) < 2:
        return list(slices)
    used = torch.stack([part.up.float().ne(0).any(dim=0) for part in slices])
    if not _is_block_diagonal(used):
        return list(slices)
    found: list[StoredModule | None] = []
    for part, mine in zip(slices, used, strict=True):
        kept = int(mine.sum())
        reduced = part.with_(up=part.up[:, mine].contiguous(), down=part.down[mine].contiguous(), rank=kept)
        found.append(reduced if kept else None)
    return found


def _is_block_diagonal(used: Tensor) -> bool:
    """Whether every column is one part's alone, and they do not all belong to one that could be a plain LoRA's."""
    return bool(used.sum(dim=0).max() == 1)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal, which torch does not compare of 8-bit floats."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def _widest(found: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype that holds all the values of those found: of fp16 and bf16 only float32 does."""
    if len(set(found)) == 1:
        return found[0]
    widest = found[0]
    for dtype in found[1:]:
        widest = torch.promote_types(widest, dtype) if dtype.itemsize > 1 < widest.itemsize else torch.float32
    return widest
