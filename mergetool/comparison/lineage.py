"""Do the models of a merge belong together? What a sample of their weights says about every ``x - y``, average and fp16 output.

Of every family, models that lie more than half of their norm apart are strangers, and a known model that lies between x and y is named: of 3240 ordered pairs of planted lineages of
twelve published models two were judged wrong (docs/explanation/compare.md). A family with a group that merges keep of one model (`Family.kept`) shows more. A fine-tune moves everything about alike, while Z-Image Base and
Turbo, with refiners of their own, are far apart there and not so far elsewhere: the *ratio* of the distance of refiners to that of layers is 0.9 to 1.2 between parents and children of the
embedded family and 3.2 to 5 between all others. And where training is known to move gains of RMSNorms away from 1 (`Family.gains_grow`), in most of them the child is farther from 1 than its
parent: a sign test over the tensors says which is which. Which of a model's ancestors is the right one to subtract cannot be told from two models. `headers` looks at names before.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from mergetool import models
from mergetool.checkpoint import shards
from mergetool.checkpoint.dtypes import F16
from mergetool.checkpoint.hub import SCHEME
from mergetool.comparison import distances, headers, samples
from mergetool.comparison.energies import Distance, percent
from mergetool.comparison.finding import Finding
from mergetool.comparison.samples import ModelSample, Samples, middle
from mergetool.comparison.weights import differences, whole_models
from mergetool.errors import MergetoolError
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import MERGED, Input

MOST_RATIO = 2.0
"""Refiners this many times farther apart than layers are not one fine-tune's: the middle, in ratio, of 1.2 and 3.2."""
LEAST_APART = 0.1
"""Refiners nearer than this are never called unrelated: quantised weights alone differ by 2 to 10 % from their originals."""
MOST_APART = 0.5
"""Layers farther apart than this share of their norm are not one fine-tune's, however far the refiners: unrelated models are at 1.4."""
LEAST_DOUBT = 1e-3
"""The chance, by the sign test, at which a difference is called reversed."""
NEARER = 0.9
"""A known model this many times as far is worth naming."""
MOST_KNOWN = 12
NO_DIFFERENCE = "the two do not differ where they were looked at"
FP16_LIMIT = 0.42
"""ComfyUI computes Z-Image in fp16 only where the standard deviation of `fp16_part` is below this."""
NEAR_LIMIT = 0.95


@dataclass(frozen=True)
class Relation:
    """Two samples: of a model, and of the one subtracted from it."""

    x: ModelSample
    y: ModelSample

    @cached_property
    def _distances(self) -> list[Distance]:
        fixed = self.x.model.anatomy.family.untrained
        return [distance for distance in samples.distances(self.x, self.y) if fixed not in distance.groups]

    @cached_property
    def refiners(self) -> float:
        """The distance of the group that merges keep of one model; 0 in a family without."""
        return middle(self._distances, self.x.model.anatomy.family.kept)

    @cached_property
    def layers(self) -> float:
        """The distance of the family's main blocks; of all parts where it names none."""
        return middle(self._distances, self.x.model.anatomy.family.main or None)

    @cached_property
    def whole(self) -> float:
        """The distance over all parts."""
        return middle(self._distances)

    @cached_property
    def is_equal(self) -> bool:
        """Whether every sampled element is the same in both, NaN included.

        It is False where no part was sampled.
        """
        both = distances.comparable([self.x.model, self.y.model])
        pairs = [(self.x.values[name], self.y.values[name]) for name in both if name in self.x.values]
        return bool(pairs) and all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)

    @property
    def is_related(self) -> bool:
        """Whether one can be a fine-tune of the other, or both of a third."""
        by_refiners = self.refiners <= LEAST_APART or self.refiners <= MOST_RATIO * self.layers
        return by_refiners and self.layers <= MOST_APART

    @cached_property
    def gains(self) -> tuple[int, int]:
        """Count the RMSNorms whose gains y has farther from 1 than x.

        The second number counts those whose gains differ at all.
        """
        if not self.x.model.anatomy.family.gains_grow:
            return 0, 0
        norms = [distance.name for distance in self._distances if "norm" in distance.groups]
        away = [tuple(_from_one(sample.values[name]) for sample in (self.x, self.y)) for name in norms]
        return sum(y > x for x, y in away), sum(y != x for x, y in away)

    @property
    def is_reversed(self) -> bool:
        """Whether y looks trained on from x, not x from y."""
        farther, differing = self.gains
        ways = sum(math.comb(differing, k) for k in range(farther, differing + 1))
        return bool(ways < LEAST_DOUBT * 2**differing)

    @property
    def is_twin(self) -> bool:
        """Whether the two look like one model, quantised in two ways.

        Their norms, which nobody quantises, are equal.
        """
        parts = (part for sample in (self.x, self.y) for part in sample.model.anatomy.own.values())
        return self.gains[1] == 0 and any(part.encoding or part.dtype.bits == 8 for part in parts)

    def apart(self) -> str:
        """The distances in words."""
        family = self.x.model.anatomy.family
        refiners = f", {percent(self.refiners)} in the {family.kept}s" if self.refiners else ""
        return f"{percent(self.layers)} apart{f' in the {family.main}' if family.main else ''}{refiners}"


@dataclass(frozen=True)
class Relations:
    """The relations of one merge's models, read on demand."""

    plan: Plan
    lineage: _Lineage

    def findings(self) -> list[Finding]:
        """The findings on lineage from a sample of the inputs.

        The sample is a few megabytes of each, and of known models when something is subtracted.
        """
        findings = [
            finding for pair in differences(self.plan.expression.graph) for finding in self.lineage.of_difference(*pair)
        ]
        findings += self.lineage.of_averages(self.plan)
        first, *others = self.plan.inputs
        findings += [finding for lora in others if lora.is_lora for finding in headers.of_lora(lora, first)]
        return [*dict.fromkeys(findings), *_fp16(self.plan)]

    def distances(self) -> tuple[tuple[str, str, float], ...]:
        """The x, y and distance over all parts of every x - y."""
        pairs = differences(self.plan.expression.graph)
        return tuple((x, y, self.lineage.relation(x, y).whole) for x, y in pairs)


def of(plan: Plan, samples: Samples) -> Relations:
    """The relations of the inputs of ``plan``, by their ``samples``. Inputs must stay open while relations are read."""
    return Relations(plan, _Lineage(samples))


def between(x: Input, y: Input) -> list[Finding]:
    """The same about ``x - y`` alone."""
    return list(_Lineage(Samples((x, y))).of_difference(x.name, y.name))


def nearer(relation: Relation, known: Iterable[ModelSample]) -> Relation | None:
    """The nearest of the ``known`` models that x can be trained from.

    It is clearly nearer than y; there may be none.

    One that lies beyond x as y sees it is a child of x: steps of training are at right angles to each other, so that each leads farther away.
    """
    best = None
    for other in known:
        if other.model.anatomy.family is not relation.x.model.anatomy.family:
            continue
        candidate = Relation(relation.x, other)
        if candidate.is_twin or candidate.is_reversed or not candidate.is_related:
            continue
        if not 0 < candidate.whole < (best or relation).whole:
            continue
        if not relation.is_related or Relation(other, relation.y).whole <= relation.whole:
            best = candidate
    return best if best is not None and best.whole < NEARER * relation.whole else None


class _Lineage:
    """One check: samples are read when they are first asked for."""

    def __init__(self, samples: Samples) -> None:
        self._inputs = {model.name: column for column, model in enumerate(samples.inputs) if not model.is_lora}
        self._samples = samples
        self._sampled: dict[str, ModelSample] = {}

    def of_averages(self, plan: Plan) -> Iterator[Finding]:
        """Whole models that are averaged, in the group that merges keep of one and elsewhere."""
        family = plan.inputs[0].anatomy.family
        kept = family.kept
        apart = self._averaged(plan, kept) if kept else []
        for pair in apart:
            relation = self.relation(*pair)
            both = f"{pair[0]} and {pair[1]}"
            if not relation.is_related:
                yield Finding(
                    "error",
                    f"the {kept}s would be averaged from {both}, which lie {relation.apart()}: what the {kept}s hand on means something "
                    f"else in each, and pictures become noise; keep one model's with `protect={kept}`, or add a difference within one "
                    "family instead of averaging two",
                )
            elif relation.refiners:
                yield Finding(
                    "note",
                    f"the {kept}s are averaged from {both}, {percent(relation.refiners)} apart; `protect={kept}` keeps one model's",
                )
        for pair in self._averaged(plan, family.main):
            relation = self.relation(*pair)
            if pair not in apart and not relation.is_related:
                lost = (
                    f"pictures depend on whose {kept}s are kept, and may be lost with either"
                    if kept
                    else "neither is a fine-tune of the other, or of one third, and pictures may be lost"
                )
                yield Finding(
                    "warn",
                    f"{pair[0]} and {pair[1]} are averaged although they lie {relation.apart()}: {lost}; adding a difference within one family "
                    "is the safer way",
                )

    def _averaged(self, plan: Plan, group: str) -> list[tuple[str, str]]:
        """The pairs of models that parts of a group, or all, are averaged from."""
        anatomy = plan.inputs[0].anatomy
        pairs: dict[tuple[str, str], None] = {}
        seen = set()
        for step in (step for tensor in plan.tensors for step in tensor.steps):
            if step.reason != MERGED or step.program is None or step.part not in anatomy.parts:
                continue
            key = (step.program, tuple(window.input for window in step.windows))
            groups = anatomy.family.groups(step.part, anatomy.parts[step.part].shape)
            if key in seen or (group and group not in groups):
                continue
            seen.add(key)
            names = [name for name in whole_models(plan, step) if name in self._inputs]
            pairs |= dict.fromkeys(combinations(names, 2))
        return list(pairs)

    def of_difference(self, x: str, y: str) -> Iterator[Finding]:
        """Whether y is the model that x was trained from: by headers, where samples leave that open, and by samples."""
        sampled = list(self._by_samples(x, y))
        is_doubted = any(finding.level != "note" for finding in sampled)
        for finding in headers.of_difference(*(self._samples.inputs[self._inputs[name]] for name in (x, y))):
            if finding.level != "note" or not is_doubted:
                yield finding
        yield from sampled

    def _by_samples(self, x: str, y: str) -> Iterator[Finding]:
        relation = self.relation(x, y)
        farther, differing = relation.gains
        if not relation.is_related:
            kept = relation.x.model.anatomy.family.kept
            why = f"{kept}s of their own" if kept and relation.layers <= MOST_APART else "different weights altogether"
            yield Finding(
                "warn",
                f"{x} - {y}: {y} does not look like the model that {x} was trained from; they lie {relation.apart()}: {why}"
                f"{self._nearest(relation)}",
            )
        elif relation.is_equal:
            yield Finding("note", f"{x} - {y}: {NO_DIFFERENCE}")
        elif relation.is_reversed:
            yield Finding(
                "warn",
                f"{x} - {y} looks reversed: {y} seems trained on from {x}, with gains farther from 1 in {farther} of {differing} norms, so that "
                f"this takes away what {y} learned; {y} - {x} adds it",
            )
        elif (nearer := self._nearer(relation)) is not None:
            yield Finding(
                "note",
                f"{x} - {y}: {nearer.y.name} lies nearer to {x} ({percent(nearer.whole)} apart, {y} {percent(relation.whole)}); if {x} builds "
                f"on it, subtract it instead",
            )

    def _nearest(self, relation: Relation) -> str:
        relative = self._nearer(relation)
        return "" if relative is None else f"; {relative.y.name} looks like it ({relative.apart()})"

    def _nearer(self, relation: Relation) -> Relation | None:
        """See `nearer`; candidates are the known models."""
        known = (self._known_sample(name) for name in self._known(relation))
        return nearer(relation, (sample for sample in known if sample is not None))

    def _known(self, relation: Relation) -> list[str]:
        """The models of this merge, others of their pipelines, registered ones that are on this disk, and the embedded ones beside an embedded one."""
        names = [*self._inputs]
        names += [name for side in (relation.x, relation.y) for name in shards.companions(side.model.checkpoint.source)]
        names += [entry.name for entry in models.listing() if not entry.path.startswith(SCHEME)]
        if any(name.startswith("lab.") for name in (relation.x.name, relation.y.name)):
            names += [f"lab.{folder.name}" for folder in sorted(models.EMBEDDED.iterdir()) if folder.is_dir()]
        names = [name for name in dict.fromkeys(names) if name not in (relation.x.name, relation.y.name)]
        return names[:MOST_KNOWN]

    def relation(self, x: str, y: str) -> Relation:
        """Two inputs by name."""
        return Relation(self._sample(x), self._sample(y))

    def _sample(self, name: str) -> ModelSample:
        """The sample of an input."""
        if name not in self._sampled:
            self._sampled[name] = self._samples.of(self._inputs[name])
        return self._sampled[name]

    def _known_sample(self, name: str) -> ModelSample | None:
        """The sample of an input or of a known model, where that can be read."""
        if name in self._inputs:
            return self._sample(name)
        try:
            with models.open_model(name) as opened:
                return Samples([Input.of(opened)]).of(0)
        except MergetoolError:
            return None


def fp16_part(plan: Plan) -> str | None:
    """The norm that ComfyUI looks at before it computes in fp16: of the last layer but one."""
    anatomy = plan.inputs[0].anatomy
    return anatomy.family.fp16_witness(anatomy)


def _fp16(plan: Plan) -> list[Finding]:
    part = fp16_part(plan)
    if part is None or plan.options.stored is not F16:
        return []
    from mergetool.comparison.result import part_of_result

    spread = float(part_of_result(plan, part).astype(np.float64).std())
    if spread < NEAR_LIMIT * FP16_LIMIT:
        return []
    measured = f"the standard deviation of {part} in the result is {spread:.3f}"
    if spread < FP16_LIMIT:
        return [
            Finding("warn", f"{measured}, just below the {FP16_LIMIT} from which on ComfyUI does not compute in fp16")
        ]
    return [
        Finding(
            "warn",
            f"{measured}: from {FP16_LIMIT} on ComfyUI does not compute in fp16, because activations overflow; write bf16 with `dtype=bf16`",
        )
    ]


def _from_one(gains: np.ndarray) -> float:
    return float(np.square(gains.astype(np.float64) - 1).sum())
