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
    """List registered names, the built-in catalogue and the embedded models."""
    from mergetool import models as registry

    entries = [(entry.name, entry.path, str(entry.origin)) for entry in registry.listing()]
    entries += [(name, str(registry.resolve(name).path), "embedded") for name in registry.embedded()]
    if as_json:
        console.print_json({"models": [dict(zip(("name", "path", "from"), entry, strict=True)) for entry in entries]})
        return
    console.table(["name", "path", "from"], entries, left=3)


@models.command("remove")
@console.command
def remove(name: Annotated[str, typer.Argument(help="A registered name")]) -> None:
    """Forget a name; the files stay."""
    from mergetool import models as registry

    registry.remove(name)
    console.heading("done", f"{name} removed")
