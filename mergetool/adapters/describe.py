"""Describe a LoRA file: ranks, alphas, dtypes, and the changed parts by group. Each part has the size of its change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.adapters.adapter import Change
from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.values import dense_rows, factor, low_rank

DENSE_ROWS = 256


@dataclass(frozen=True, slots=True)
class ChangedPart:
    """One part that a file changes: groups, kind, rank, scale, and the change's norm. It is the Frobenius norm.

    A DoRA's norm is that of its product, since the rest depends on the weight; a whole weight's is 0 for the same reason.
    """

    part: str
    groups: frozenset[str]
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    scale: float
    norm: float


@dataclass(frozen=True, slots=True)
class Contents:
    """The contents of a file: ``targets`` in the family's order, ``alphas``, ``dtypes``.

    Alphas are the stated values (None: of modules that state none), dtypes the stored types of the factors, each with
    its count. ``non_finite`` are tensors with NaN or infinity, of the whole file.
    """

    targets: tuple[ChangedPart, ...]
    alphas: dict[float | None, int]
    dtypes: dict[str, int]
    non_finite: tuple[str, ...] = ()

    @property
    def ranks(self) -> list[int]:
        """The ranks of all parts that have one, sorted."""
        return sorted(target.rank for target in self.targets if target.rank is not None)


def describe(file: LoraFile, *, progress: Callable[[int], None] = lambda _: None) -> Contents:
    """Read all factors of ``file``, a module at a time. ``progress`` is told of each part."""
    targets = []
    for part in sorted(file.changes, key=file.family.order):
        squares = 0.0
        for change in (change for change in file.changes[part] if change.adapter.kind != "whole"):
            squares += _squares(file, change)
        adapter = file.changes[part][0].adapter
        kind = "dora" if "dora_scale" in adapter.tensors else adapter.kind
        shape = (file.changes[part][0].rows, *adapter.shape[1:]) if adapter.shape else ()
        groups = file.family.groups(part, shape)
        targets.append(ChangedPart(part, groups, kind, shape, adapter.rank, adapter.scale, math.sqrt(squares)))
        progress(1)
    adapters = file.adapters
    # the alpha of rsLoRA's scale is that which other programs would write
    alphas = Counter(
        round(one.scale * one.rank, 9) if one.has_alpha and one.rank else None for one in adapters if one.rank
    )
    dtypes = Counter(file.checkpoint.tensors[key].dtype.name for one in adapters for key in one.tensors.values())
    damaged = tuple(
        key
        for key, info in file.checkpoint.tensors.items()
        if info.dtype.blendable and not np.isfinite(factor(file, key)).all()
    )
    return Contents(tuple(targets), dict(alphas), dict(dtypes), damaged)


def _squares(file: LoraFile, change: Change) -> float:
    """The squared Frobenius norm of a change: of a product from its factors' Gram matrices, in float64.

    ||up @ down||^2 = sum((up^T up) * (down down^T)).
    """
    found = low_rank(file, change, scaled=False)
    if found is not None:
        up, down = (values.astype(np.float64) for values in found)
        return max(0.0, float(np.sum((up.T @ up) * (down @ down.T)))) * change.adapter.scale**2
    squares = 0.0
    for row in range(0, change.rows, DENSE_ROWS):
        rows = dense_rows(file, change, row, min(DENSE_ROWS, change.rows - row))
        squares += float(np.square(rows, dtype=np.float64).sum())
    return squares


def by_block(targets: Sequence[ChangedPart]) -> Iterator[tuple[str, list[ChangedPart]]]:
    """Group targets by block: ``layers.3``, ``noise_refiner.0``, or a first component elsewhere."""
    blocks: dict[str, list[ChangedPart]] = {}
    for target in targets:
        blocks.setdefault(block_of(target.part), []).append(target)
    yield from blocks.items()


def block_of(part: str) -> str:
    """The block of a part: its name up to the first number, without one its first component."""
    components = part.split(".")
    number = next((i for i, component in enumerate(components[:-1]) if component.isdigit()), None)
    return components[0] if not number else ".".join(components[: number + 1])


def total(targets: Sequence[ChangedPart]) -> float:
    """The Frobenius norm of several changes together."""
    return math.sqrt(math.fsum(target.norm**2 for target in targets))
