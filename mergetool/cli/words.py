"""``mergetool help [COMMAND]`` and ``mergetool version``, which are --help and --version."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mergetool import __version__
from mergetool.cli import console
from mergetool.errors import UsageError

CommandWords = Annotated[
    list[str] | None, typer.Argument(help="The command, as in: lora merge.", metavar="[COMMAND]...")
]


@console.command
def show_help(context: typer.Context, words: CommandWords = None) -> None:
    """Show the help of mergetool or of a command."""
    shown: Any = context.find_root()
    for word in words or ():
        command = shown.command.commands.get(word) if hasattr(shown.command, "commands") else None
        if command is None:
            known = ", ".join(getattr(shown.command, "commands", ())) or "none"
            raise UsageError(f'"{shown.command_path}" has no command "{word}"; it has {known}.')
        shown = command.context_class(command, info_name=word, parent=shown)
    typer.echo(shown.get_help())


def version() -> None:
    """Print the version."""
    typer.echo(f"mergetool {__version__}")
