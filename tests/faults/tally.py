"""What a harness counted, and the file of counts that ``docs/explanation/faults.md`` is made of."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "explanation" / "faults.json"


@dataclass
class Tally:
    """Faults injected, how many of them struck, and what was violated, for one promise of the table.

    ``struck`` counts by kind of fault. Whatever was injected must strike, so ``fired`` less than ``injected`` is a failure,
    except where the moment is drawn at random (``random``): a kill after the end of a run strikes nothing.
    """

    row: str
    what: str
    random: bool = False
    injected: int = 0
    fired: int = 0
    violations: list[str] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def note(self, kind: str, fired: bool, violations: Iterable[str], where: str = "") -> None:
        """One fault of this ``kind`` and what came of it."""
        self.injected += 1
        self.fired += fired
        self.struck[kind] += fired
        self.violations += [f"{where or kind}: {text}" for text in violations]

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.struck.items()))
        seconds = time.monotonic() - self.started
        return (
            f"{self.row:>3}  {self.what:<48} {self.injected:>9,} injected {self.fired:>9,} fired "
            f"{len(self.violations):>4} violations {seconds:>7.0f} s   {kinds}"
        )

    def require(self, least: int) -> None:
        """Raises AssertionError unless at least ``least`` faults struck, none missed, and nothing was violated."""
        assert self.violations == [], f"{self}\n" + "\n".join(self.violations[:20])
        assert self.fired >= least, str(self)
        assert self.random or self.fired == self.injected, str(self)

    def save(self, tier: str, results: Path = RESULTS) -> None:
        """Append to the file of counts, a JSON object a line."""
        line: dict[str, Any] = {
            "row": self.row,
            "what": self.what,
            "tier": tier,
            "injected": self.injected,
            "fired": self.fired,
            "violations": len(self.violations),
            "kinds": dict(sorted(self.struck.items())),
            "examples": self.violations[:5],
            "seconds": round(time.monotonic() - self.started),
            **provenance(),
        }
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


@functools.cache
def provenance() -> dict[str, str]:
    """The commit and the machine of a count; asked once, before the first count changes the file it is written to."""
    described = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    return {"commit": commit, "machine": f"{system}, Python {platform.python_version()}"}
