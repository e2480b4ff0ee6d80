"""Tell models apart by their input: some take a mask or another picture beside it.

A plain model is such a model whose weights for what it does not take are zero, so the two can be added. That holds along the input channels of
one weight, a family's `InputEmbedder`; a family without a table has those of all that have one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod

from mergetool.arch.anatomy import Anatomy, InputEmbedder, Part
from mergetool.arch.families import FAMILIES


def wide_shapes(models: Sequence[Anatomy]) -> dict[str, tuple[int, ...]]:
    """The parts that are wider in some of ``models`` than in the others, with the shape there.

    The models are of one family. The others are plain models, and the wide ones all of one width: channels of different kinds have the same
    place in models of different widths, and are nothing to be added.
    """
    found = {}
    for embedder in _embedders(models[0]):
        parts = [model.parts[embedder.part] for model in models if embedder.part in model.parts]
        shapes = sorted({part.shape for part in parts})
        if len(shapes) == 2 and _extends(*shapes) and shapes[0][1] in _plain(embedder, models):
            found[embedder.part] = shapes[1]
    return found


def own_row(part: Part) -> int:
    """The elements of a row of a part, all of its input channels."""
    return prod(part.shape[1:])


def _extends(narrow: tuple[int, ...], wide: tuple[int, ...]) -> bool:
    return len(narrow) == len(wide) >= 2 and narrow[0] == wide[0] and narrow[2:] == wide[2:]


def _plain(embedder: InputEmbedder, models: Sequence[Anatomy]) -> set[int]:
    """The input channels of a plain model, which makes as many as it takes."""
    outputs: list[Mapping[str, Part]] = [model.parts for model in models if embedder.output in model.parts]
    return {parts[embedder.output].shape[0] // embedder.patch for parts in outputs}


def _embedders(model: Anatomy) -> Iterator[InputEmbedder]:
    own = model.family.input_embedder
    if own is not None:
        yield own
    elif model.family.keeps_names:
        named = {
            tuple(family.stored_name(part, layout) for part in (found.part, found.output)): found.patch
            for family in FAMILIES
            for layout in family.layouts
            if (found := family.input_embedder) is not None
        }
        yield from (InputEmbedder(part, output, patch) for (part, output), patch in named.items())
