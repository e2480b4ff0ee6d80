"""The events of a run. Every face shows them in its own way; a call from Python shows a bar, or nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.errors import ExpressionError
from mergetool.options.kinds import ModelName, Models
from mergetool.options.table import Table, rows

if TYPE_CHECKING:
    from mergetool.comparison.finding import Finding
    from mergetool.comparison.preflight import Preflight

StrPath = str | os.PathLike[str]
Progress = bool | Callable[[int, int], None]
"""False for none, True for a bar on stderr, or a function of the work done and the total."""

Advance = Callable[[int], None]
"""A function that counts the work done since its last call."""


Bar = AbstractContextManager[Advance]


def _nothing(count: int) -> None:
    pass


class Events:
    """The events of a run, in this order, which do nothing until a face overrides them.

    ``plan`` is told what an operation is going to do, while its inputs are open: a `Plan`, a `Paired`, ... with the bytes of memory that it takes;
    ``done`` what became of it.
    """

    def note(self, text: str) -> None:
        """Called with a sentence on the request: a completed name, an option without effect."""

    def survey(self, tasks: Sequence[Any]) -> None:
        """The outputs of a recipe, before the first is begun."""

    def output(self, task: Any) -> None:
        """The output of a recipe that the next events are about."""

    def current(self, path: Path) -> None:
        """An output is there as it would be written now, and stays."""

    def waiting(self, task: Any) -> None:
        """An output of a recipe that is planned when others are there; of a dry run."""

    def verifying(self, task: Any) -> None:
        """An output of a recipe that is going to be verified."""

    def verified(self, task: Any, checked: Any) -> None:
        """Called with the result of that verification."""

    def plan(self, plan: Any, memory: int) -> None:
        """Called with the plan before the run."""

    def together(self, count: int, passes: int, moved: int, memory: int, written: int) -> None:
        """Called where several outputs are made at the same time; sizes are bytes."""

    def finding(self, finding: Finding) -> None:
        """Called with each finding of the preflight."""

    def checked(self, checked: Preflight) -> None:
        """Called with all measurements of the preflight."""

    def progress(self, word: str, total: int, unit: str = "B", *, publishes: bool = False) -> Bar:
        """Open a block in which `Advance` counts finished work. With ``publishes`` its end is the end of the run."""
        return nullcontext(_nothing)

    def done(self, plan: Any, result: Any) -> None:
        """Called with the result, after ``progress`` has ended, while inputs are open."""


@dataclass(frozen=True, kw_only=True)
class Request(Table):
    """The base of the API's requests: a table of options, and the caller's choice of progress."""

    progress: Progress = False

    def check(self) -> None:
        """Raise ExpressionError for a broken expression, before any file is opened."""
        super().check()
        for row in rows(type(self)).values():
            if isinstance(row.option.kind, ModelName | Models) and not row.option.kind.stored:
                held = getattr(self, row.name)
                for text in [held] if isinstance(held, str) else held or ():
                    _require_model(row.name, text)


def _require_model(name: str, text: str) -> None:
    from mergetool.recipe.argument import expression_of

    try:
        expression_of(text)
    except ExpressionError as error:
        raise ExpressionError(f"`{name}`: {error}") from None


class Called(Events):
    """The events of a call from Python: a bar, or the caller's own function."""

    def __init__(self, shown: Progress) -> None:
        self._shown = shown

    def note(self, text: str) -> None:
        """A UserWarning."""
        warnings.warn(text, stacklevel=4)  # the line that called the function

    def progress(self, word: str, total: int, unit: str = "B", *, publishes: bool = False) -> Bar:
        """A bar, where the caller chose one."""
        return counting(word, total, self._shown, unit)


@contextmanager
def counting(word: str, total: int, progress: Progress, unit: str = "B") -> Iterator[Advance]:
    """Give a function to call with the work done since the last call."""
    done = 0
    with reporting(word, progress, unit) as report:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done, total)

        yield advance


@contextmanager
def reporting(word: str, progress: Progress, unit: str) -> Iterator[Callable[[int, int], None]]:
    """Give a function to call with the work done and the total."""
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
