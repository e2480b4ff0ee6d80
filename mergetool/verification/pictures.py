"""Judge pictures of a merge beside those of its parents, with the same prompts and seeds.

report = check_pictures({"alkahest": "lab.alkahest"}, "out.safetensors", studio, look)
report.passed          True when no verdict says no
report.verdicts[0]     Verdict(name='noise', passed=True, value=0.0, limit=0.25, ...)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergetool.lab import checker, world
from mergetool.lab.world import Scene
from mergetool.sampler import session
from mergetool.sampler.request import Pictures, StepCounter
from mergetool.sampler.session import Drawer, MadePicture
from mergetool.verification import images
from mergetool.verification.images import Measures
from mergetool.verification.looks import Look

ALLOWED = 0.25
"""Largest share of a merge's pictures that may fail a verdict."""

KEPT_ADHERENCE = 0.75
"""Least adherence of a merge, as a share of its best parent's."""

AT_LEAST = ("adherence", "score")
"""Verdicts whose value must not be below its limit; those of the others must not be above it."""

PROMPTS_NOT_READ = "nothing here tells whether pictures show their prompts; `clip` does"

Scorer = Callable[[Sequence[Pictures], Sequence[str]], list[float]]
"""Pictures and their prompts to a score each, higher where a picture shows its prompt."""


@dataclass(frozen=True)
class Column:
    """The pictures of one model after one stage, with their measures.

    There is one for each shot. ``adherent`` says for each picture whether it shows its prompt, and is None where nothing can tell;
    ``scores`` are an optional scorer's.
    """

    model: str
    label: str
    made: tuple[MadePicture, ...]
    measures: tuple[Measures, ...]
    adherent: tuple[bool, ...] | None
    scores: tuple[float, ...] | None = None

    @property
    def pictures(self) -> list[Pictures]:
        return [drawn.picture for drawn in self.made]

    @property
    def adherence(self) -> float | None:
        """The share of the pictures that show their prompt."""
        return None if self.adherent is None else float(np.mean(self.adherent))


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check: ``value`` against ``limit``, and a sentence for people. Where nothing could judge, ``passed`` and both figures are None."""

    name: str
    passed: bool | None
    value: float | None
    limit: float | None
    sentence: str

    @property
    def word(self) -> str:
        """The word on the badge."""
        return "not judged" if self.passed is None else "pass" if self.passed else "FAIL"

    @property
    def wanted(self) -> str:
        """The limit in words: a share that pictures may or must reach, or a score."""
        if self.limit is None:
            return ""
        if self.name in AT_LEAST:
            return f"at least {self.limit:.0%}" if self.name == "adherence" else f"at least {self.limit:.3g}"
        return f"at most {self.limit:.0%}"


@dataclass(frozen=True)
class PicturesReport:
    """The pictures of a merge and its parents, with the verdicts.

    ``columns`` are the parents' and then the merge's, each after the first stage and after every second one.
    """

    look: Look
    columns: tuple[Column, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """No verdict says no."""
        return all(verdict.passed is not False for verdict in self.verdicts)

    @property
    def merge_first(self) -> list[Column]:
        """The columns with the merge's own before its parents'."""
        return sorted(self.columns, key=lambda column: not self.own(column))

    def own(self, column: Column) -> bool:
        """Whether the merge drew this column."""
        return column.model == self.look.first.model


def check_pictures(
    parents: Mapping[str, str],
    output: str,
    studio: Drawer,
    look: Look,
    *,
    scorer: Scorer | None = None,
    progress: StepCounter = lambda _: None,
) -> PicturesReport:
    """Sample every parent and ``output``, measure, and judge the output's pictures.

    ``parents`` maps names to MODEL arguments. Raises what the sampler raises.
    """
    columns: list[Column] = []
    second = session.second_drawer(studio, look.request(output))
    prompts = [shot.prompt for shot in look.shots]
    for name, model in (*parents.items(), (output, output)):
        rows = session.make(studio, look.request(model), second, progress=progress)
        for index, made in enumerate(zip(*rows, strict=True)):
            label = name if index == 0 else f"{name} + {look.refinements[index - 1].strength:g}"
            columns.append(observe(name, label, made, prompts, scorer=scorer))
    return PicturesReport(look, tuple(columns), judge(columns, output))


def evaluations(look: Look, parents: int) -> int:
    """Count the transformer's evaluations of a look, guidance counted once."""
    return (parents + 1) * look.request(look.first.model).evaluations


def observe(
    model: str, label: str, made: Sequence[MadePicture], prompts: Sequence[str], *, scorer: Scorer | None = None
) -> Column:
    """Measure pictures of one model after one stage."""
    shown = [drawn.picture for drawn in made]
    scores = None if scorer is None else tuple(scorer(shown, prompts))
    return Column(model, label, tuple(made), tuple(map(images.measure, shown)), _adherent(shown, prompts), scores)


def _adherent(pictures: Sequence[Pictures], prompts: Sequence[str]) -> tuple[bool, ...] | None:
    scenes = [Scene.parse(prompt) for prompt in prompts]
    if any(picture.shape != (world.SIZE, world.SIZE, 3) for picture in pictures):
        return None
    if not all(scenes):
        return None
    return tuple(checker.read(picture).matches(scene) for picture, scene in zip(pictures, scenes, strict=True) if scene)


def judge(columns: Sequence[Column], output: str) -> tuple[Verdict, ...]:
    """Judge the stages of ``output`` in the light of its parents' columns.

    The first stage is judged, and the first of the second ones.
    """
    own = [column for column in columns if column.model == output][:2]
    others = [column for column in columns if column.model != output]
    verdicts = [
        _share("noise", "without structure", [[m.noise for m in column.measures] for column in own]),
        _share("collapsed", "flat or burnt", [[m.collapsed for m in column.measures] for column in own]),
    ]
    if len(own) > 1:
        verdicts.append(_drift(columns, output))
    if others:
        verdicts.append(_unlike(own[0], others))
    judged = False
    for name, value in (("adherence", _adherence), ("score", _score)):
        mine, theirs = [value(column) for column in own], [value(column) for column in others]
        known = [v for v in mine if v is not None]
        if known:
            judged = True
            verdicts.append(_against_parents(name, min(known), [v for v in theirs if v is not None]))
    if not judged:
        verdicts.append(Verdict("prompts", None, None, None, PROMPTS_NOT_READ))
    return tuple(verdicts)


def _unlike(own: Column, others: Sequence[Column]) -> Verdict:
    """A merge's pictures lie about where its parents' do; ruined ones leave the range of all of them in some measure."""
    usual = [m for column in others for m in column.measures if not (m.noise or m.collapsed)]
    if not usual:
        return Verdict("unlike", None, None, None, "no parent drew a picture to compare with")
    far = images.outside(own.measures, usual)
    value = float(np.mean(far))
    return Verdict("unlike", value <= ALLOWED, value, ALLOWED, f"{sum(far)} of {len(far)} pictures unlike any parent's")


def _drift(columns: Sequence[Column], output: str) -> Verdict:
    """A second stage takes some of a model's character away, from its parents' pictures too: a merge fails when it drifts
    in clearly more of its pictures than any parent does.
    """
    drifted: dict[str, list[bool]] = {}
    for model in dict.fromkeys(column.model for column in columns):
        stages = [column.pictures for column in columns if column.model == model][:2]
        if len(stages) == 2:
            drifted[model] = [images.drifted(*pair) for pair in zip(*stages, strict=True)]
    own = drifted.pop(output)
    parents = max((float(np.mean(flags)) for flags in drifted.values()), default=0.0)
    limit = min(1.0, ALLOWED + parents)
    sentence = f"the second stage changes {sum(own)} of {len(own)} pictures, and {parents:.0%} of a parent's"
    return Verdict("drift", float(np.mean(own)) <= limit, float(np.mean(own)), limit, sentence)


def _adherence(column: Column) -> float | None:
    return column.adherence


def _score(column: Column) -> float | None:
    return None if column.scores is None else float(np.mean(column.scores))


def _share(name: str, fault: str, failing: Sequence[Sequence[bool]]) -> Verdict:
    """A verdict on the column with the most failing pictures."""
    worst = max(failing, key=sum)
    value = float(np.mean(worst))
    return Verdict(name, value <= ALLOWED, value, ALLOWED, f"{sum(worst)} of {len(worst)} pictures {fault}")


def _against_parents(name: str, value: float, parents: Sequence[float]) -> Verdict:
    best = max(parents, default=1.0)
    limit = KEPT_ADHERENCE * best
    own, parent = (f"{figure:.0%}" if name == "adherence" else f"{figure:.3g}" for figure in (value, best))
    sentence = f"{own} of the pictures show their prompt" if name == "adherence" else f"{own} on average"
    return Verdict(name, value >= limit and value > 0, value, limit, f"{sentence}; {parent} of the best parent's")


def summary(report: PicturesReport) -> dict[str, Any]:
    """Everything but the pictures, as JSON values."""
    return {
        "passed": report.passed,
        "notes": list(report.look.notes),
        "verdicts": [dataclasses.asdict(verdict) for verdict in report.verdicts],
        "columns": [
            {
                "model": column.model,
                "label": column.label,
                "adherence": column.adherence,
                "score": _score(column),
                "pictures": [
                    dataclasses.asdict(measures)
                    | {"adherent": None if column.adherent is None else column.adherent[i]}
                    | {"parameters": made.parameters}
                    for i, (made, measures) in enumerate(zip(column.made, column.measures, strict=True))
                ],
            }
            for column in report.columns
        ],
    }
