"""``mergetool help [COMMAND]`` and ``mergetool version``, which are --help and --version."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mergetool import __version__, packages
from mergetool.cli import console, refusals

CommandWords = Annotated[list[str] | None, typer.Argument(help="The command, e.g. lora merge.", metavar="[COMMAND]...")]


@console.command
def show_help(context: typer.Context, words: CommandWords = None) -> None:
    """Show the first page, or the help of a command."""
    shown: Any = context.find_root()
    for word in words or ():
        commands = getattr(shown.command, "commands", {})
        command = commands.get(word)
        if command is None:
            raise refusals.unknown_command(shown, [word], [name for name in commands if not commands[name].hidden])
        shown = command.context_class(command, info_name=word, parent=shown)
    typer.echo(shown.get_help())


@console.command
def version(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print the version, with Python, torch and kernels.

    mergetool doctor looks at more.
    """
    from mergetool.installation import interpreter, processor

    kernels = processor.kernels()
    told = {
        "mergetool": __version__,
        "python": interpreter.python().text,
        "system": interpreter.system().text,
        "torch": packages.installed("torch") or "not installed",
        "kernels": kernels.text,
    }
    if as_json:
        console.print_json(told)
        return
    for name, text in told.items():
        console.say(f"{name} {text}")
