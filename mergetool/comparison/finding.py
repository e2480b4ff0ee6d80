"""The findings about a merge before it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["note", "warn", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about a merge, with its measurements. An error means that pictures would be noise."""

    level: Level
    text: str

    @property
    def is_error(self) -> bool:
        """Whether the merge should not be made without the user's word."""
        return self.level == "error"
