"""Between plan and run: do the models belong together, and how far from its anchor does the merge land?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergetool.comparison import landing, lineage
from mergetool.comparison.finding import Finding
from mergetool.comparison.landing import Landing
from mergetool.comparison.samples import Samples
from mergetool.errors import LineageError
from mergetool.recipe.plan import Plan


@dataclass(frozen=True, slots=True)
class Preflight:
    """What a sample of the inputs says about a merge: ``landing`` in figures, ``findings`` in words, its own among them."""

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
    """Read a few megabytes of every input of ``plan``, and of known models when something is subtracted.

    The inputs must be open. Raises what reading them raises; known models that cannot be read are passed over.
    """
    samples = Samples(plan.inputs)
    relations = lineage.of(plan, samples)
    found = landing.measure(plan, samples, relations.distances())
    return Preflight(found, (*found.findings(), *relations.findings()))
