"""What the functions that take no `Request` yet have in common."""

from __future__ import annotations

from collections.abc import Sequence

from mergetool.api.events import counting
from mergetool.errors import UsageError

__all__ = ["counting", "patterns"]


def patterns(given: Sequence[str]) -> tuple[str, ...]:
    """Patterns as options take them. Raises UsageError for one text, whose letters would be taken for them."""
    if isinstance(given, str):
        raise UsageError(f'patterns are a list, as in ["{given}"], not one text.')
    return tuple(given)
