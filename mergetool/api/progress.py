"""What the functions that take no `Request` yet have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from mergetool.api.events import Progress, counting, reporting
from mergetool.errors import UsageError

__all__ = ["bars", "counting", "patterns", "reporting"]


def patterns(given: Sequence[str]) -> tuple[str, ...]:
    """Patterns as options take them. Raises UsageError for one text, whose letters would be taken for them."""
    if isinstance(given, str):
        raise UsageError(f'patterns are a list, as in ["{given}"], not one text.')
    return tuple(given)


def bars(progress: Progress) -> Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]:
    """`counting` for what asks for several bars one after the other."""
    return lambda word, total, unit: counting(word, total, progress, unit)
