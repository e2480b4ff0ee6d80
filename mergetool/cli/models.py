"""``mergetool models``: names for checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli.console import JsonOption

models = typer.Typer(
    help="Names for checkpoints, kept in your config folder (or in ./mergetool.toml with --here), so that expressions "
    "can say alkahest instead of a path.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@models.command("add")
@console.command
def add(
    name: Annotated[str, typer.Argument(help="Letters, digits, dots, - and _")],
    path: Annotated[str, typer.Argument(help="A file, a folder, or hf://org/repo[/file][@revision]")],
    here: Annotated[bool, typer.Option("--here", help="Write ./mergetool.toml instead of your config folder.")] = False,
) -> None:
    """Register a name: mergetool models add alkahest ~/models/alkahest.safetensors"""
    from mergetool import models as registry

    registry.add(name, path, "here" if here else "user")
    console.heading("done", f"{name} = {path}")


@models.command("list")
@console.command
def list_(as_json: JsonOption = False) -> None:
    """List registered names and the built-in catalogue."""
    from mergetool import models as registry

    entries = registry.listing()
    if as_json:
        console.print_json({"models": [{"name": e.name, "path": e.path, "from": e.origin} for e in entries]})
        return
    console.table(["name", "path", "from"], ([e.name, e.path, e.origin] for e in entries), left=3)


@models.command("remove")
@console.command
def remove(name: Annotated[str, typer.Argument(help="A registered name")]) -> None:
    """Forget a name; the files stay."""
    from mergetool import models as registry

    registry.remove(name)
    console.heading("done", f"{name} removed")
