"""Command groups that import a command on demand. To build all 24 of them takes a tenth of a second, at every start."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from mergetool.cli import refusals
from mergetool.cli.page import PagedCommand, aligned

CommandPlaces = Mapping[str, tuple[str, str]]
"""Command -> its place, and its line in the list of commands; one without is not listed."""


class _Commands(Mapping[str, Any]):
    """The commands of one group, in their order: each built when it is first looked up."""

    def __init__(self, places: CommandPlaces) -> None:
        self._places = places
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            self._built[name] = _built(name, *self._places[name])
        return self._built[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def group_of(places: CommandPlaces, headings: Mapping[str, tuple[str, ...]] | None = None) -> type[TyperGroup]:
    """A class of group, for ``typer.Typer(cls=...)``, with a command for each name.

    A place is "module:name" in this folder: of a function, a command with the module's EXAMPLES, or those under its name there, as its epilog and its CONTEXT as
    click's settings; or of a `typer.Typer`, a group in this one. The list of commands is its summaries: no command is imported for it.
    ``headings`` are names of commands by what stands above them in that list; one list without.
    """
    listed = [name for name, (_, summary) in places.items() if summary]
    lists = {"Commands": listed} if headings is None else headings

    class Group(TyperGroup):
        def __init__(self, **attributes: Any) -> None:
            super().__init__(**(attributes | {"commands": _Commands(places)}))

        def collect_usage_pieces(self, ctx: Any) -> list[str]:
            return ["COMMAND", "[OPTIONS]"]

        def format_options(self, ctx: Any, formatter: Any) -> None:
            """Write the commands, under their headings, then the options."""
            records = {
                heading: [(name, places[name][1]) for name in names if name in places]
                for heading, names in lists.items()
            }
            for heading, commands in aligned(records):
                with formatter.section(heading):
                    formatter.write_dl(commands)
            options = [record for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
            with formatter.section("Options"):
                formatter.write_dl(options)

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            if args[0] not in places and not args[0].startswith("-"):
                raise refusals.unknown_command(ctx, args, listed)
            return super().resolve_command(ctx, args)

        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            with refusals.in_one_sentence(ctx):
                return super().parse_args(ctx, args)

        def invoke(self, ctx: Any) -> Any:
            with refusals.in_one_sentence(ctx):
                return super().invoke(ctx)

    return Group


def _built(name: str, place: str, summary: str) -> Any:
    module_name, _, attribute = place.partition(":")
    module = importlib.import_module(f"mergetool.cli.{module_name}")
    target = getattr(module, attribute)
    if isinstance(target, typer.Typer):
        command: Any = get_group(target)
        command.name = name
        return command
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    examples = getattr(module, "EXAMPLES", None)
    app.command(
        name,
        cls=PagedCommand,
        epilog=examples.get(name) if isinstance(examples, Mapping) else examples,
        context_settings=getattr(module, "CONTEXT", None),
        short_help=summary,
        hidden=not summary,
    )(target)
    return get_command(app)
