"""Models of every family with a planted lineage: samples with the published sizes, made of random numbers.

Of each family there are a base, fine-tunes that moved it by 1 to 5 %, one of attention alone, two distilled models that moved by 12 and 28 %, a fine-tune of each, and an unrelated
model. Matrices are normal numbers of a spread of their own, gains lie around 1, and what is no module's weight (tables of positions) is the same in all, as in real families.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import permutations
from unittest.mock import patch

import numpy as np

from mergetool.arch import Anatomy, recognise
from mergetool.comparison.energies import Distance
from mergetool.comparison.lineage import Relation, nearer
from mergetool.comparison.samples import ModelSample, distances
from mergetool.recipe.steps import Input
from tests.arch.published import MODELS
from tests.arch.tables import table

PARENTS: Mapping[str, tuple[str, float]] = {
    "tuned1": ("base", 0.01), "tuned2": ("base", 0.02), "tuned5": ("base", 0.05), "attention": ("base", 0.02),
    "distilled12": ("base", 0.12), "distilled28": ("base", 0.28),
    "of12": ("distilled12", 0.03), "of28": ("distilled28", 0.03),
}  # fmt: skip
"""Child -> what it was trained from, and how far it moved in all that was trained."""
NAMES = ("base", "stranger", *PARENTS)
EACH, PARTS = 2048, 90
"""Elements of each part, at most, and parts of each model, about; these are spread over all of it."""


def family(name: str, seed: int) -> dict[str, ModelSample]:
    """The samples of all models of one family."""
    anatomy = recognise(table(MODELS[name]), source=name)
    every = max(1, len(anatomy.parts) // PARTS)
    anatomy = replace(
        anatomy,
        parts={
            part: found
            for i, (part, found) in enumerate(anatomy.parts.items())
            if i % every == 0 or _is_constant(anatomy, part)
        },
    )
    random = np.random.default_rng(seed)
    first = _root(anatomy, random)
    made = {
        "base": first,
        "stranger": {**_root(anatomy, random), **{n: v for n, v in first.items() if _is_constant(anatomy, n)}},
    }
    for child, (parent, share) in PARENTS.items():
        made[child] = {
            part: values
            if _is_constant(anatomy, part) or not _is_trained(anatomy, part, child)
            else _moved(values, share, random)
            for part, values in made[parent].items()
        }
    sizes = {part.name: part.numel for part in anatomy.parts.values()}
    inputs = {model: Input(model, None, anatomy) for model in made}  # type: ignore[arg-type]
    return {model: ModelSample(model, inputs[model], values, sizes) for model, values in made.items()}


def _root(anatomy: Anatomy, random: np.random.Generator) -> dict[str, np.ndarray]:
    values = {}
    for part in anatomy.parts.values():
        count = min(EACH, part.numel)
        if not count:
            continue
        noise = random.standard_normal(count, np.float32)
        groups = anatomy.family.groups(part.name, part.shape)
        if "norm" in groups and len(part.shape) == 1 and part.name.endswith("weight"):
            values[part.name] = 1 + 0.1 * noise
        else:
            values[part.name] = noise * np.float32(0.03 * np.exp(0.5 * random.standard_normal()))
        if _is_constant(anatomy, part.name):
            values[part.name] = np.sin(np.arange(count, dtype=np.float32))
    return values


def _is_constant(anatomy: Anatomy, part: str) -> bool:
    return "position" in anatomy.family.groups(part, anatomy.parts[part].shape)


def _is_trained(anatomy: Anatomy, part: str, child: str) -> bool:
    return child != "attention" or "attention" in anatomy.family.groups(part, anatomy.parts[part].shape)


def _moved(values: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    size = float(np.sqrt(np.square(values).mean())) * share * np.exp(0.3 * random.standard_normal())
    return values + np.float32(size) * random.standard_normal(values.size, np.float32)


def ancestors(model: str) -> Iterator[str]:
    """All that a model was trained from, the nearest first."""
    while model in PARENTS:
        model = PARENTS[model][0]
        yield model


def judged(samples: Mapping[str, ModelSample]) -> Counter[str]:
    """Count the verdicts on every ordered pair, with all other models as those that are known."""
    measured: dict[tuple[str, str], list[Distance]] = {}

    def once(x: ModelSample, y: ModelSample) -> list[Distance]:
        if (x.name, y.name) not in measured:
            measured[x.name, y.name] = distances(x, y)
        return measured[x.name, y.name]

    with patch("mergetool.comparison.samples.distances", once):
        return _judged(samples)


def _judged(samples: Mapping[str, ModelSample]) -> Counter[str]:
    found: Counter[str] = Counter()
    for x, y in permutations(samples, 2):
        relation = Relation(samples[x], samples[y])
        strangers = "stranger" in (x, y)
        found["pairs"] += 1
        found["strangers"] += strangers
        found["strangers missed"] += strangers and relation.is_related
        found["relatives called strangers"] += not strangers and not relation.is_related
        if strangers:
            continue
        said = nearer(relation, (samples[z] for z in samples if z not in (x, y)))
        parent = next(ancestors(x), None)
        wanted = parent if parent not in (None, y) and y != "attention" else None
        is_due = wanted is not None and Relation(samples[x], samples[wanted]).whole < 0.8 * relation.whole
        found["nearer ones due"] += is_due
        found["nearer ones missed"] += is_due and (said is None or said.y.name != wanted)
        found["nearer ones told without need"] += said is not None and said.y.name not in ancestors(x)
    return found


def total(names: Iterable[str] = MODELS, seeds: Iterable[int] = range(3)) -> dict[str, Counter[str]]:
    """The counts by family."""
    return {name: sum((judged(family(name, seed)) for seed in seeds), Counter[str]()) for name in names}


if __name__ == "__main__":
    for name, counts in total().items():
        print(name, dict(counts))
