"""The display of a run in a terminal: lines as it goes on, or one JSON object at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from mergetool.api.events import Bar, Events
from mergetool.cli import console
from mergetool.cli.parameters import Typed

if TYPE_CHECKING:
    from mergetool.comparison.finding import Finding


class CommandEvents(Events):
    """The events of a command; ``json`` is the object that ``--json`` prints."""

    def __init__(self, typed: Typed) -> None:
        self.typed = typed
        self.json: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def shown(cls, typed: Typed) -> Iterator[Self]:
        """A report for a block, whose JSON is printed at its end."""
        report = cls(typed)
        yield report
        if typed.as_json:
            console.print_json(report.json)

    @property
    def prints(self) -> bool:
        """Whether lines are printed."""
        return not self.typed.as_json

    def note(self, text: str) -> None:
        """A line, or an entry of ``notes``."""
        if self.prints:
            console.heading("note", text)
        else:
            self.json.setdefault("notes", []).append(text)

    def finding(self, finding: Finding) -> None:
        """A line, or an entry of ``lineage``."""
        if self.prints:
            console.heading(finding.level, finding.text)
        else:
            self.json.setdefault("lineage", []).append({"level": finding.level, "text": finding.text})

    def progress(self, word: str, total: int, unit: str = "B", *, publishes: bool = False) -> Bar:
        """A bar on stderr."""
        return console.progress(word, total, shown=self.typed.shows_progress, unit=unit, publishes=publishes)
