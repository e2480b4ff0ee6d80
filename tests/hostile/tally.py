"""What a harness did: how many faults it put in, how many were judged, and what was wrong."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.tally import RESULTS, provenance

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
    started: float = field(default_factory=time.monotonic)

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

    def __str__(self) -> str:
        seconds = time.monotonic() - self.started
        counts = f"{self.injected:>10,} injected {self.judged:>10,} judged {len(self.violations):>4} violations {seconds:>7.0f} s"
        return "\n".join(
            [f"{self.row:<18} {self.what:<72} {counts}", *(f"    {text}" for text in self.violations[:SHOWN])]
        )

    def save(self, tier: str, results: Path = RESULTS) -> None:
        """Append to the file of counts that docs/explanation/faults.md is made of, a JSON object a line."""
        line = {
            "row": self.row,
            "what": self.what,
            "tier": tier,
            "injected": self.injected,
            "fired": self.judged,
            "violations": len(self.violations),
            "kinds": {},
            "examples": [text[:300] for text in self.violations[:SHOWN]],
            "seconds": round(time.monotonic() - self.started),
            **provenance(),
        }
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
