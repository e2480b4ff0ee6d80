"""Commands from the table of options: rows become parameters, typed values a request."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeVar

import typer

from mergetool.cli import console
from mergetool.options.kinds import Choice, Flag, Kind, ModelName, Models, Patterns, Settings
from mergetool.options.table import Row, Section, Table, rows_in

T = TypeVar("T", bound=Table)

PRINTING = {
    "as_json": ("--json", "Print one JSON object instead of text."),
    "no_progress": ("--no-progress", "Show no progress bar."),
    "verbose": ("--verbose", "List every tensor instead of counting them."),
}


@dataclass(frozen=True)
class Typed:
    """The options that were typed.

    ``given`` has their values by name, ``own`` those that belong to the command alone.
    """

    given: Mapping[str, Any]
    own: Mapping[str, Any] = field(default_factory=dict)
    as_json: bool = False
    no_progress: bool = False
    verbose: bool = False

    @property
    def shows_progress(self) -> bool:
        """Whether to show a bar."""
        return not (self.no_progress or self.as_json)

    def request(self, table: type[T], **more: Any) -> T:
        """The request that was typed. Raises UsageError for values that contradict each other."""
        return table(**{**self.given, **more})


def command(
    table: type[Table],
    *,
    own: Sequence[inspect.Parameter] = (),
    filled: Sequence[str] = (),
    prints: Sequence[str] = tuple(PRINTING),
    own_section: Section = "Screen",
) -> Callable[[Callable[[Typed], None]], Callable[..., None]]:
    """Make a command of a function of `Typed`.

    It has an option for every row of ``table``. ``own`` are parameters for typer that belong to the command alone, with the section of
    help that they stand in, ``prints`` those of `PRINTING` that it has; ``filled`` names rows that it finds by itself where they are not typed.
    """
    known = {
        name: replace(row, initial=None) if name in filled else row for name, row in rows_in(table, "command").items()
    }
    console.speak_of(table)

    def decorate(function: Callable[[Typed], None]) -> Callable[..., None]:
        def run(**typed: Any) -> None:
            console.speak_of(table)
            said = {name: typed[name] for name in prints}
            given = {name: row.read(typed[name]) for name, row in known.items() if typed[name] not in (None, [])}
            mine = {extra.name: typed[extra.name] for extra in own}
            function(Typed(given, mine, **said))

        parameters = [parameter(row) for row in known.values()] + list(own) + [_printing(name) for name in prints]
        parameters.sort(key=lambda each: each.default is not inspect.Parameter.empty)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        run.request = table  # type: ignore[attr-defined]
        run.sections = {extra.name: own_section for extra in own} | {  # type: ignore[attr-defined]
            name: row.option.section for name, row in known.items()
        }
        return console.command(run)

    return decorate


def parameter(row: Row) -> inspect.Parameter:
    """A row as a parameter for typer. Its value is text, which the row reads, so that every face refuses the same."""
    kind, option = row.option.kind, row.option
    if isinstance(kind, Flag):
        both = row.initial is None
        spelling = f"{row.flag}/--no-{row.flag.removeprefix('--')}" if both else row.flag
        said = typer.Option(
            *filter(None, (spelling, option.short)),
            help=f"{console.spelled(option.help)}{_default(row)}",
            show_default=False,
        )
        return _keyword(row.name, bool | None, said, None)
    many: Any = list[str] if kind.many else str
    completion = _completion(kind)
    if option.argument:
        said = typer.Argument(
            help=console.spelled(option.help), metavar=_metavar(row), show_default=False, autocompletion=completion
        )
        return _keyword(row.name, many if row.is_needed else many | None, said, _EMPTY if row.is_needed else None)
    said = typer.Option(
        *filter(None, (row.flag, option.also and f"--{option.also}", option.short)),
        help=f"{console.spelled(option.help)}{_choices(kind)}{_repeatable(kind)}{_default(row)}",
        metavar=kind.metavar,
        show_default=False,
        autocompletion=completion,
    )
    return _keyword(row.name, many if row.is_needed else many | None, said, _EMPTY if row.is_needed else None)


_EMPTY = inspect.Parameter.empty


def _keyword(name: str, kind: Any, said: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, said], default=default)


def _printing(name: str) -> inspect.Parameter:
    flag, said = PRINTING[name]
    flags = (flag, "-v") if name == "verbose" else (flag,)
    return _keyword(name, bool, typer.Option(*flags, help=said), False)


def _metavar(row: Row) -> str:
    return row.option.kind.metavar if not row.option.kind.many else f"{row.option.kind.metavar}..."


def _choices(kind: Kind) -> str:
    return f" One of {', '.join(kind.words)}." if isinstance(kind, Choice) else ""


def _repeatable(kind: Kind) -> str:
    return " Repeatable." if kind.many else ""


def _default(row: Row) -> str:
    default = row.option.default or row.initial
    said = console.spelled(str(default))
    nothing = default is None or default is False or default == ()
    return "" if row.is_needed or nothing else f" [default: {said}]"


def _completion(kind: Kind) -> Callable[[str], list[str]] | None:
    """The completions of a value: words, registered models, groups."""
    if isinstance(kind, Choice):
        return lambda incomplete: [word for word in kind.words if word.startswith(incomplete)]
    if isinstance(kind, ModelName | Models):
        return _models
    if isinstance(kind, Patterns | Settings):
        return _groups
    return None


def _models(incomplete: str) -> list[str]:
    from mergetool import models

    return [entry.name for entry in models.listing() if entry.name.startswith(incomplete)]


def _groups(incomplete: str) -> list[str]:
    from mergetool import models

    with models.open_model("lab.base", names_only=True) as opened:
        return [name for name in opened.anatomy.family.group_names(opened.anatomy) if name.startswith(incomplete)]
