"""The rows of the table of options, the dataclasses that hold them, and their spelling.

Every face spells an option in its own way in a sentence.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from mergetool.errors import UsageError
from mergetool.options.kinds import Kind, sentence

Section = Literal[
    "",
    "Models",
    "Parts",
    "Output",
    "Number format",
    "Ranks",
    "Pictures",
    "First stage",
    "Second stage",
    "Third stage",
    "Text encoder and VAE",
    "Checks",
    "Recipe files",
    "Machine",
    "Screen",
]
SECTIONS: tuple[Section, ...] = get_args(Section)[1:]
"""The sections of a command's options, in the order in which help and documentation have them; a command's arguments are in none."""

Face = Literal["command", "api", "recipe", "node"]
FACES: tuple[Face, ...] = ("command", "api", "recipe", "node")


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option's row, besides its name, type and default.

    ``section`` is its section in help and documentation.

    ``flag`` is its spelling on the command line where that is not the name with hyphens, ``short`` another with one letter, ``also`` another name, ``argument`` that it stands there
    without a name; ``key`` is its spelling in a recipe. ``default`` is what the default means, in words, where the value alone does not say it. ``missing`` has, for a face that does not have the option, why.
    """

    help: str
    kind: Kind
    section: Section = ""
    flag: str = ""
    short: str = ""
    also: str = ""
    key: str = ""
    argument: bool = False
    default: str = ""
    missing: Mapping[Face, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One option of a class: its name, its default and its `Option`. ``dataclasses.MISSING`` stands for no default."""

    name: str
    initial: Any
    option: Option

    @property
    def flag(self) -> str:
        """Its spelling on the command line."""
        return "--" + (self.option.flag or self.name.replace("_", "-"))

    @property
    def key(self) -> str:
        """Its spelling in a recipe."""
        return self.option.key or self.name

    @property
    def is_needed(self) -> bool:
        """Whether there is no default."""
        return self.initial is dataclasses.MISSING

    def value(self, given: Any) -> Any:
        """``given`` as the library sees it, the default as it is. Raises UsageError."""
        if given is None and self.initial is None:
            return None
        try:
            return self.option.kind.value(given)
        except ValueError as wanted:
            raise sentence(self.name, given, str(wanted)) from None

    def read(self, typed: Any) -> Any:
        """The `value` of typed text. Raises UsageError."""
        try:
            return self.option.kind.read(typed)
        except ValueError as wanted:
            raise sentence(self.name, typed, str(wanted)) from None


class Table:
    """The base of a dataclass of rows.

    It checks each value, and brings it to its one form, when an instance is made.
    """

    def __post_init__(self) -> None:
        """Raise UsageError for a value that its option does not take, and for values that contradict each other."""
        for row in rows(type(self)).values():
            object.__setattr__(self, row.name, row.value(getattr(self, row.name)))
        self.check()

    def check(self) -> None:
        """Raise UsageError for values that contradict each other.

        Every class of options adds its own checks to its bases'.
        """


def rows(table: Any) -> Mapping[str, Row]:
    """The rows of a dataclass by name: its own, then those of each base, in the order of both."""
    return _rows(table)


@functools.cache
def _rows(table: Any) -> Mapping[str, Row]:
    assert isinstance(table, type)
    hints = typing.get_type_hints(table, include_extras=True)
    fields: Mapping[str, dataclasses.Field[Any]] = getattr(table, "__dataclass_fields__", {})
    table_rows = {}
    if not dataclasses.is_dataclass(table):
        return {}
    for name in (
        *inspect.get_annotations(table),
        *(name for base in table.__bases__ for name in rows(base)),
    ):
        for said in getattr(hints[name], "__metadata__", ()):
            if isinstance(said, Option) and name not in table_rows:
                table_rows[name] = Row(name, fields[name].default, said)
    return table_rows


def named(name: str, table: type = Table) -> Row | None:
    """The row of that name in a loaded table. All tables spell a name alike."""
    if name in rows(table):
        return rows(table)[name]
    below: list[type] = type.__subclasses__(table)
    return next((row for inner in below if (row := named(name, inner)) is not None), None)


def rows_in(table: type, face: Face) -> dict[str, Row]:
    """The rows that a face has."""
    return {name: row for name, row in rows(table).items() if face not in row.option.missing}


def values(table: Table) -> dict[str, Any]:
    """The values of a table, by the names of its rows."""
    return {name: getattr(table, name) for name in rows(type(table))}


def recorded(table: Table) -> dict[str, Any]:
    """The values of a table that are not defaults, as JSON, by a recipe's keys.

    The table that is made of them again is equal to it.
    """
    held = values(table)
    return {
        row.key: row.option.kind.recorded(held[name])
        for name, row in rows(type(table)).items()
        if held[name] != row.initial
    }


def part(table: Any, of: Table) -> Any:
    """The rows of ``of`` that belong to ``table``, as its instance."""
    return table(**{name: getattr(of, name) for name in rows(table)})


_NAMED = re.compile(r'`(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>"(?:[^`"\\]|\\.)*"|[^`\s]*))?`')


def spelled(text: str, spell: Callable[[str, str | None], str | None]) -> str:
    """Spell every option that ``text`` names as ``spell`` does.

    An option is `` `name` `` or `` `name=value` ``; where ``spell`` gives None, it stays.
    """

    def replaced(match: re.Match[str]) -> str:
        said = spell(match["name"], match["value"])
        return match[0] if said is None else said

    return _NAMED.sub(replaced, text)


def first_named(text: str, known: Mapping[str, Row]) -> Row | None:
    """The row among ``known`` that ``text`` names first."""
    return next((known[mention["name"]] for mention in _NAMED.finditer(text) if mention["name"] in known), None)


def refuse_together(given: Mapping[str, bool], why: str) -> None:
    """Raise UsageError where more than one of the ``given`` options is set. ``why`` ends the sentence."""
    there = [f"`{name}`" for name, is_there in given.items() if is_there]
    if len(there) > 1:
        raise UsageError(f"{' and '.join(there)} contradict each other; {why}.")
