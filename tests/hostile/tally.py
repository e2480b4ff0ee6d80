"""What a harness did: how many faults it put in, how many were judged, and what was wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

SHOWN = 3


@dataclass
class Tally:
    """One row of the table. ``injected`` hostile inputs were made, ``judged`` of them reached the code and got a verdict.

    A harness whose two numbers differ has proved nothing, so `require` fails for it as it does for a violation.
    """

    row: str
    what: str
    injected: int = 0
    judged: int = 0
    violations: list[str] = field(default_factory=list)

    def judge(self, fault: str | None) -> None:
        """Count one input; ``fault`` says what was wrong with the verdict, None that it was right."""
        self.judged += 1
        if fault is not None:
            self.violations.append(fault)

    def require(self, least: int) -> None:
        """Raises AssertionError unless at least ``least`` inputs were injected, all judged, and none wrongly."""
        assert not self.violations, f"{len(self.violations)} violations: {self.violations[:SHOWN]}"
        assert self.judged == self.injected >= least, (
            f"{self.judged} of {self.injected} judged, at least {least} wanted"
        )

    def line(self, **more: object) -> str:
        """The row as one line of JSON."""
        counts = {"injected": self.injected, "fired": self.judged, "violations": len(self.violations)}
        return json.dumps({"row": self.row, "harness": self.what, **counts, **more})
