"""What all functions of the API take: paths, patterns, and a wish to see how far they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from mergetool.errors import UsageError

StrPath = str | os.PathLike[str]
Progress = bool | Callable[[int, int], None]
"""False for none, True for a bar on stderr, or a function of what is done and of the total."""


def patterns(given: Sequence[str]) -> tuple[str, ...]:
    """Patterns as options take them. Raises UsageError for one text, whose letters would be taken for them."""
    if isinstance(given, str):
        raise UsageError(f'patterns are a list, as in ["{given}"], not one text.')
    return tuple(given)


@contextmanager
def counting(word: str, total: int, progress: Progress, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """A function to call with what was done since the last call."""
    done = 0
    with reporting(word, progress, unit) as report:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done, total)

        yield advance


@contextmanager
def reporting(word: str, progress: Progress, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and the total."""
    if progress is False:
        yield lambda done, total: None
    elif progress is True:
        from tqdm import tqdm

        with tqdm(desc=word, unit=unit, unit_scale=True) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show
    else:
        yield progress


def bars(progress: Progress) -> Callable[[str, int, str], AbstractContextManager[Callable[[int], None]]]:
    """`counting` for what asks for several bars one after the other."""
    return lambda word, total, unit: counting(word, total, progress, unit)
