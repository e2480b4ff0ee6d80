"""The result of ComfyUI's DoRA formula on a model, beside that of training.

Training (the paper, PEFT, LyCORIS) divides a row of W + S by its own norm, ComfyUI 0.30 (``comfy/weight_adapter/base.py``) by that of the
row of W alone. Of a DoRA by input channels both say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergetool.adapters.dora import EPSILON, DoraRows
from mergetool.adapters.lora_file import LoraFile
from mergetool.adapters.rows import anatomy_of
from mergetool.arch import Anatomy
from mergetool.checkpoint.reader import Checkpoint


@dataclass(frozen=True, slots=True)
class Difference:
    """The distance of ComfyUI's DoRA from training's, over ``parts`` that it changes by rows.

    ``share`` is the Frobenius norm of ComfyUI's change minus training's, over the norm of training's; ``largest`` is
    the largest share of one part, ``part``.
    """

    parts: int
    share: float
    part: str
    largest: float


def difference(file: LoraFile, model: Anatomy, checkpoint: Checkpoint) -> Difference | None:
    """Measure how far ComfyUI's weights are from the trainer's, at strength 1. None where no part is changed by rows.

    Reads the parts in question of ``checkpoint``. Raises what `dora_rows` raises.
    """
    changed = anatomy_of(file, model, checkpoint).parts.items()
    energies = {
        name: _energies(part.encoding)
        for name, part in changed
        if isinstance(part.encoding, DoraRows) and part.encoding.norms is None
    }
    if not energies:
        return None
    worst = max(energies, key=lambda name: _share(*energies[name]))
    apart, moved = (math.fsum(column) for column in zip(*energies.values(), strict=True))
    return Difference(len(energies), _share(apart, moved), worst, _share(*energies[worst]))


def _energies(rows: DoraRows) -> tuple[float, float]:
    """Squared norms of the difference of the two, and of training's change."""
    apart = moved = 0.0
    for row in range(0, rows.rows, rows.tile_rows):
        count = min(rows.tile_rows, rows.rows - row)
        trained = rows.values(_no_bytes, row, count).astype(np.float64)
        weight = rows.weight.rows(row, count).astype(np.float64)
        summed = weight + rows.change.values(_no_bytes, row, count)
        norms = np.sqrt(np.square(weight).sum(axis=1, keepdims=True)) + EPSILON
        theirs = rows.magnitudes[row : row + count, None] * summed / norms - weight
        apart += float(np.square(theirs - trained).sum())
        moved += float(np.square(trained).sum())
    return apart, moved


def _share(apart: float, moved: float) -> float:
    return math.sqrt(apart / moved) if moved else 0.0 if not apart else math.inf


def _no_bytes(tensor: str, start: int, size: int) -> bytes:
    raise AssertionError("a change reads its own files")
