"""Check models between plan and run: their lineage, and the distance from the anchor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mergetool.comparison import landing, lineage
from mergetool.comparison.finding import Finding
from mergetool.comparison.landing import Landing
from mergetool.comparison.samples import Samples
from mergetool.errors import LineageError
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import Input


@dataclass(frozen=True, slots=True)
class Preflight:
    """The result of a merge's sample: ``landing`` in figures, ``findings`` in words.

    The findings of the landing are among them.
    """

    landing: Landing
    findings: tuple[Finding, ...]

    def refuse(self) -> None:
        """Raises LineageError for the first finding that is an error."""
        for finding in self.findings:
            if finding.is_error:
                raise LineageError(f"{finding.text}; `force` merges anyway.")

    def record(self) -> dict[str, Any]:
        """The findings and figures for JSON."""
        return {
            "lineage": [{"level": finding.level, "text": finding.text} for finding in self.findings],
            "landing": self.landing.record(),
        }


def check(plan: Plan) -> Preflight:
    """Sample every input of ``plan``, and known models when something is subtracted.

    Inputs that are merges are checked too.

    A few megabytes of each are read. The inputs must be open. Raises what reading them raises; known models that cannot be read are passed
    over.
    """
    samples = Samples(plan.inputs)
    relations = lineage.of(plan, samples)
    measured = landing.measure(plan, samples, relations.distances())
    return Preflight(measured, (*of_models(plan.inputs), *measured.findings(), *relations.findings()))


def of_models(inputs: Iterable[Input]) -> Iterator[Finding]:
    """Sample each input that is an expression; its findings have its name in front. Raises what `check` raises."""
    for model in inputs:
        for finding in check(model.plan).findings if model.plan is not None else ():
            yield replace(finding, text=f"{model.name}: {finding.text}")
