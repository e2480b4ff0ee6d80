"""Command groups that import a command when it is asked for: to build all 24 of them takes a tenth of a second, at every start."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from mergetool.cli.fitting import fitted


class _Commands(Mapping[str, Any]):
    """The commands of one group, in their order: each built when it is first looked up."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _built(name, self._places[name])
        return self._built[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def group_of(places: Mapping[str, str]) -> type[TyperGroup]:
    """A class of group, for ``typer.Typer(cls=...)``, with a command for each name.

    A place is "module:name" in this folder: of a function, a command with the module's EXAMPLES, or those under its name there, as its epilog, its CONTEXT as click's settings and hidden where that says HIDDEN, or of a `typer.Typer`, a
    group in this one.
    """

    class Group(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**(attributes | {"commands": _Commands(places)}))

    return Group


def _built(name: str, place: str) -> Any:
    module_name, _, attribute = place.partition(":")
    module = importlib.import_module(f"mergetool.cli.{module_name}")
    found = getattr(module, attribute)
    if isinstance(found, typer.Typer):
        command: Any = get_group(found)
        command.name = name
        return command
    one = typer.Typer(rich_markup_mode=None, add_completion=False)
    examples = getattr(module, "EXAMPLES", None)
    one.command(
        name,
        epilog=fitted((examples[name] if isinstance(examples, Mapping) else examples) or ""),
        context_settings=getattr(module, "CONTEXT", None),
        hidden=getattr(module, "HIDDEN", False),
    )(found)
    return get_command(one)
