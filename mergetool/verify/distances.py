"""How far a model lies from another one, part by part: Frobenius norms of the difference, streamed.

found = measure(merged, parent)
relative(found)                                          0.031: the change is 3.1 % of the parent's norm
relative(found, lambda part: "refiner" in part.groups)   0.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mergetool.engine.reading import fetcher
from mergetool.lora.delta import DeltaReader
from mergetool.lora.pairs import Pair, Pairing
from mergetool.recipe.steps import Input


@dataclass(frozen=True, slots=True)
class Distance:
    """One parameter under its canonical name: the Frobenius norms of the other model's, and of the difference."""

    name: str
    groups: frozenset[str]
    norm: float
    change: float


def measure(model: Input, other: Input, *, progress: Callable[[int], None] = lambda _: None) -> list[Distance]:
    """The distance of ``model`` from ``other`` for every float parameter that both have in one shape, in
    the order of the family: as a forward pass reads them.

    ``progress`` gets bytes read. Memory is a few megabytes whatever the models' size.
    """
    family = model.anatomy.family
    pairs = tuple(
        Pair(theirs, part, family.groups(name, part.shape))
        for name, part in sorted(model.anatomy.parts.items(), key=lambda item: family.order(item[0]))
        if (theirs := other.anatomy.parts.get(name)) is not None
        and theirs.shape == part.shape
        and part.dtype.blendable
        and theirs.dtype.blendable
    )
    files = [*model.checkpoint.files, *other.checkpoint.files]
    reader = DeltaReader(Pairing(other, model, pairs, ()), fetcher("auto", files))
    found = []
    for pair in pairs:
        norm, change = reader.energies(pair)
        found.append(Distance(pair.name, pair.groups, math.sqrt(norm), math.sqrt(change)))
        progress(pair.base.nbytes + pair.variant.nbytes)
    return found


def relative(found: Sequence[Distance], wanted: Callable[[Distance], bool] = lambda _: True) -> float:
    """The norm of the change over the norm of the other model, over the parts ``wanted``; 0 where there are none."""
    chosen = [distance for distance in found if wanted(distance)]
    norm = math.fsum(distance.norm**2 for distance in chosen)
    change = math.fsum(distance.change**2 for distance in chosen)
    return math.sqrt(change / norm) if norm else 0.0 if not change else math.inf
