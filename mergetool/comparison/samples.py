"""A fixed sample of a model's elements: a few megabytes that say how near two models are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mergetool.arch import Part
from mergetool.checkpoint.reader import Checkpoint
from mergetool.comparison.distances import comparable
from mergetool.comparison.energies import Distance, Energies
from mergetool.engine.feeding.values import ValueReader
from mergetool.ops.sums import square
from mergetool.quant.encoding import Floats
from mergetool.quant.fp8 import widened
from mergetool.recipe.steps import Input, Window, window_of

MOST, LEAST = 4096, 64
"""Elements of a part, or a row where that is longer: of Z-Image 3 to 4 MB of a BF16 file, norms whole. The verdicts on the embedded family are the same
with 64 elements of each part."""
TOTAL = 1 << 21
"""Elements of a model of very many parts, in which the smaller ones give up some of theirs: a sample is held in float32."""

AROUND = 128 << 10
"""Bytes that the kernel may have read on behind a request. All of it is let go: small pages that are strewn over a
file in the cache divide what is read into it later. Comparing two files of 12.3 GB took 8.9 s after their samples had
been read, and 7.6 without (2 cores, AMD EPYC 7003)."""


@dataclass(frozen=True, slots=True)
class ModelSample:
    """A sample of one model's float parts: the middle rows, or all where those are few.

    ``sizes`` are the whole parts'.
    """

    name: str
    model: Input
    values: Mapping[str, Floats]
    sizes: Mapping[str, int]


class Samples:
    """The samples of opened models; an element is read once, whoever asks for it, and kept."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self.inputs = tuple(inputs)
        self._reader = ValueReader((), "pread")
        self._values: dict[tuple[object, ...], Floats] = {}

    def of(self, column: int) -> ModelSample:
        """The sample of the model at ``column``. Raises what reading raises."""
        model = self.inputs[column]
        parts, most = _floats(model), most_of(model)
        values: dict[str, Floats] = {}
        for name, part in parts.items():
            start, count = middle_rows(part.numel, part.shape[-1] if part.shape else 1, most)
            values[name] = self.values(window_of(column, model, part), start, count)
        return ModelSample(model.name, model, values, {name: part.numel for name, part in parts.items()})

    def values(self, window: Window, start: int, count: int) -> Floats:
        """Read elements ``[start, start + count)`` of a window as float32 [count].

        They are not to be written to. Raises what reading raises.
        """
        key = (window.input, window.tensor, window.start, window.row, id(window.encoding), start, count)
        if key not in self._values:
            self._values[key] = _read(self._reader, self.inputs[window.input].checkpoint, window, start, count)
        return self._values[key]


def _floats(model: Input) -> dict[str, Part]:
    return {name: part for name, part in model.anatomy.own.items() if part.dtype.blendable and part.numel}


def most_of(model: Input) -> int:
    """The most elements of each part in the sample of ``model``."""
    return min(MOST, max(LEAST, TOTAL // max(1, len(_floats(model)))))


def middle_rows(elements: int, width: int, most: int) -> tuple[int, int]:
    """The first element of a part's sample, and its number of elements.

    The number is ``most``, in whole rows of ``width``, at least one row.
    """
    rows = elements // width
    taken = min(rows, max(1, most // width))
    return (rows - taken) // 2 * width, taken * width


def _read(reader: ValueReader, checkpoint: Checkpoint, window: Window, start: int, count: int) -> Floats:
    """Read elements ``[start, start + count)`` of a window, and drop the pages around them."""
    elements = reader.fetch(0, checkpoint, window, start, count)
    out = np.empty(count, np.float32)
    if elements.is_plain:
        out[:] = widened(elements.raw[0], elements.dtype)
    else:
        elements.decode(out)
    reader.release(elements)
    for file, offset, size in elements.places:
        file.forget(offset // AROUND * AROUND, size + 2 * AROUND)
    return out


def distances(variant: ModelSample, base: ModelSample) -> list[Distance]:
    """Measure the distance of ``variant`` from ``base`` in their samples.

    Each part counts as the whole of it; parts whose samples hold NaN or infinity are missing.
    """
    family = base.model.anatomy.family
    apart = []
    for name in (name for name in comparable([base.model, variant.model]) if name in base.values):
        x, y = variant.values[name], base.values[name]
        share = base.sizes[name] / y.size
        groups = family.groups(name, base.model.anatomy.parts[name].shape)
        of_y, of_x, of_delta = (square(values) * share for values in (y, x, x - y))
        if math.isfinite(of_x + of_y + of_delta):
            apart.append(Distance(name, groups, Energies(base.sizes[name], of_y, of_x, of_delta, of_y)))
    return apart


def middle(distances: Sequence[Distance], group: str | None = None) -> float:
    """||x - y|| / sqrt(||x|| ||y||) over the parts of a group, or all: the same both ways round. 0 where there are none."""
    total = Energies.total(distance.energies for distance in distances if group is None or group in distance.groups)
    scale = (total.base * total.variant) ** 0.5
    return float((total.delta / scale) ** 0.5) if scale else 0.0
