"""How often verify would say no to a kind of picture: by its own judgement of as many pictures as it looks at, drawn from those measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mergetool.verification import images, pictures
from mergetool.verification.images import Measures
from mergetool.verification.looks import EMBEDDED_PROMPTS
from mergetool.verification.pictures import ALLOWED, Column
from training.claims.bench import MEASURES, Readings

RUNS = 400


@dataclass(frozen=True)
class Looked:
    """A kind of picture: its readings after the first stage, and whether each drifted in the second; None where there is none."""

    readings: Readings
    drifted: NDArray[np.bool_] | None

    @classmethod
    def of(cls, first: Readings, second: Readings | None) -> Looked:
        if second is None:
            return cls(first, None)
        far = (
            second["colour distance"] > images.MOST_COLOUR_DRIFT,
            second["structural distance"] > images.MOST_STRUCTURAL_DRIFT,
        )
        return cls(first, np.logical_or(*far))

    def measures(self, picked: Sequence[int]) -> tuple[Measures, ...]:
        return tuple(Measures(*(float(self.readings[name][i]) for name in MEASURES)) for i in picked)

    def counts(self) -> dict[str, int]:
        """How many pictures each measurement rejects."""
        measured = self.measures(range(len(self.readings["adherent"])))
        counted = {"noise": sum(one.noise for one in measured), "collapsed": sum(one.collapsed for one in measured)}
        counted["adherence"] = int(np.sum(~self.readings["adherent"]))
        return counted | ({} if self.drifted is None else {"drift": int(self.drifted.sum())})

    def column(self, model: str, picked: Sequence[int]) -> Column:
        return Column(model, model, (), self.measures(picked), tuple(self.readings["adherent"][list(picked)].tolist()))


def refusals(output: Looked, parents: Sequence[Looked]) -> Mapping[str, float]:
    """The share of runs of verify in which each verdict says no, and any of them: "any". Every run looks at the same prompts of all models."""
    generator = np.random.default_rng(0)
    count = len(output.readings["adherent"])
    said: list[set[str]] = []
    for _ in range(RUNS):
        picked = generator.choice(count, min(EMBEDDED_PROMPTS, count), replace=False).tolist()
        columns = [parent.column(f"parent {number}", picked) for number, parent in enumerate(parents)]
        judged = pictures.judge([*columns, output.column("output", picked)], "output")
        no = {verdict.name for verdict in judged if verdict.passed is False}
        if _drifts(output, parents, picked):
            no.add("drift")
        said.append(no | ({"any"} if no else set()))
    names = ("noise", "collapsed", "drift", "unlike", "adherence", "any")
    return {name: float(np.mean([name in no for no in said])) for name in names}


def _drifts(output: Looked, parents: Sequence[Looked], picked: Sequence[int]) -> bool:
    """The verdict on drift, which verify reads off pictures that are not kept here."""
    if output.drifted is None:
        return False
    theirs = [float(parent.drifted[list(picked)].mean()) for parent in parents if parent.drifted is not None]
    return float(output.drifted[list(picked)].mean()) > min(1.0, ALLOWED + max(theirs, default=0.0))
