"""The distance of a model from another, part by part: Frobenius norms, streamed.

apart = measure(merged, parent)
relative(apart)                                          0.031: the change is 3.1 % of the parent's norm
relative(apart, lambda part: "refiner" in part.groups)   0.0
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from mergetool.comparison.chunks import Chunk, ComparedModels, Measured, stream
from mergetool.comparison.energies import Distance, Energies
from mergetool.engine.jobs import CHUNK
from mergetool.recipe.steps import Input


def measure(model: Input, other: Input, *, progress: Callable[[int], None] = lambda _: None) -> list[Distance]:
    """Measure the distance of ``model`` from ``other`` in every parameter they share.

    Those are float parameters of one shape in both, in the order of the family: as a forward pass reads them.

    ``progress`` gets bytes read. Memory is some megabytes a thread whatever the models' size.
    """
    operands = ComparedModels((other, model), 0, 1, 0)
    parts = comparable([model, other])
    chunks = [chunk for part in parts for chunk in cut(operands, part)]
    return by_part(operands, chunks, stream(operands, chunks, progress=progress))


def comparable(models: Sequence[Input]) -> list[str]:
    """The float parameters that all models have in one shape, in family order.

    Markers, which have no elements, are not among them.
    """
    first, *others = (model.anatomy.parts for model in models)
    return [
        name
        for name in sorted(first, key=models[0].anatomy.family.order)
        if first[name].dtype.blendable
        and first[name].numel
        and all(name in parts and parts[name].shape == first[name].shape for parts in others)
        and all(parts[name].dtype.blendable for parts in others)
    ]


def cut(operands: ComparedModels, part: str) -> Iterator[Chunk]:
    """A part in chunks; of quantised weights in whole rows, so that none is decoded twice."""
    windows = [operands.window(column, part) for column in operands.columns]
    width = max((window.encoding.tile_rows * window.encoding.width for window in windows if window.encoding), default=1)
    elements = operands.inputs[operands.base].anatomy.parts[part].numel
    chunk = max(1, CHUNK // width) * width
    for start in range(0, elements, chunk):
        yield Chunk(part, start, min(chunk, elements - start))


def by_part(operands: ComparedModels, chunks: Sequence[Chunk], measured: Iterable[Measured]) -> list[Distance]:
    """The sums of every part, in the order of the chunks."""
    base = operands.inputs[operands.base].anatomy
    sums: dict[str, list[Energies]] = {}
    for chunk, (energies, _) in zip(chunks, measured, strict=True):
        if energies is not None:
            sums.setdefault(chunk.part, []).append(energies)
    return [
        Distance(part, base.family.groups(part, base.parts[part].shape), Energies.total(each))
        for part, each in sums.items()
    ]
