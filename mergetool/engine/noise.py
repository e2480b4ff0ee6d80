"""The rounding noise in a quantised model, measured on a sample of its own codes."""

from __future__ import annotations

import math

import numpy as np

from mergetool.recipe.steps import Input

ROWS = 8


def measure(model: Input) -> float | None:
    """Measure the rounding noise in a model's quantised weights.

    It is the RMS of the noise over that of those weights; None where it has none.

    Whatever was rounded to codes that are a step apart at some place carries noise of step / sqrt(12) there. The steps are those of `ROWS`
    rows in the middle of every quantised weight: some 10 MB of a 6 GB file.
    """
    noise = signal = 0.0
    encodings = {part.stored.tensor: part.encoding for part in model.anatomy.own.values() if part.encoding}
    for encoding in encodings.values():
        rows = min(ROWS, encoding.rows)
        row = (encoding.rows - rows) // 2
        raw = [memoryview(model.checkpoint.read(s.tensor, s.start, s.size)) for s in encoding.spans(row, rows)]
        values = np.empty((rows, encoding.width), np.float32)
        encoding.decode(raw, row, rows, values)
        steps = np.broadcast_to(encoding.steps(raw, row, rows), (rows, encoding.padded[1]))[:, : encoding.width]
        with np.errstate(over="ignore", invalid="ignore"):
            share = encoding.rows / rows
            noise += share * float(np.square(steps, dtype=np.float64).sum()) / 12
            signal += share * float(np.square(values, dtype=np.float64).sum())
    return math.sqrt(noise / signal) if signal > 0 and math.isfinite(noise / signal) else None
