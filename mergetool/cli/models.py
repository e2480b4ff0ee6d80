"""``mergetool models``: names for checkpoints."""

from __future__ import annotations

import typer

from mergetool.api.catalogue import AddModel, RemoveModel, add_model, list_models, remove_model
from mergetool.api.events import Request
from mergetool.cli import console
from mergetool.cli.parameters import Typed, command

models = typer.Typer(
    help="Name models, list names, forget them.\n\nThey are kept in your config folder (or in ./mergetool.toml with --here), so that "
    "expressions can say alkahest instead of a path.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@models.command("add")
@command(AddModel, prints=("as_json",))
def add(typed: Typed) -> None:
    """Give a model a name.

    As in: mergetool models add alkahest ~/models/alkahest.safetensors
    """
    asked = typed.request(AddModel)
    add_model(asked)
    _done(typed, f"{asked.name} = {asked.path}", name=asked.name, path=asked.path)


@models.command("list")
@command(Request, prints=("as_json",))
def list_(typed: Typed) -> None:
    """List the names that there are.

    Registered names, the built-in catalogue and the embedded models.
    """
    entries, heads = list_models(), ("name", "path", "from")
    if typed.as_json:
        console.print_json({"models": [dict(zip(heads, entry, strict=True)) for entry in entries]})
    else:
        console.table(heads, entries, left=3)


@models.command("remove")
@command(RemoveModel, prints=("as_json",))
def remove(typed: Typed) -> None:
    """Forget a name; the files stay."""
    asked = typed.request(RemoveModel)
    remove_model(asked)
    _done(typed, f"{asked.name} removed", removed=asked.name)


def _done(typed: Typed, text: str, **record: str) -> None:
    if typed.as_json:
        console.print_json(record)
    else:
        console.heading("done", text)
