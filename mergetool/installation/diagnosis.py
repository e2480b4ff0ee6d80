"""One line of the findings of `mergetool doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Health = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The state of one thing.

    A note does not keep ordinary merges from working, a problem is something that is broken; ``remedy`` is the command, or the deed, that
    mends it. ``facts`` are for programs.
    """

    topic: str
    verdict: Health
    text: str
    remedy: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
