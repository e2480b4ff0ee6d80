"""``mergetool models``: names for checkpoints."""

from __future__ import annotations

import typer

from mergetool.api.catalogue import AddModel, RemoveModel, add_model, list_models, remove_model
from mergetool.api.events import Request
from mergetool.cli import console
from mergetool.cli.lazily import group_of
from mergetool.cli.parameters import Typed, command

EXAMPLES = {
    "add": """\b
Examples:
  mergetool models add mine alkahest.safetensors
  mergetool models add mine alkahest.safetensors --here

A name that exists gets the new meaning. An address such as hf://Tongyi-MAI/Z-Image/transformer works in place of a path; the model is
downloaded when a command first reads it.
""",
    "list": """\b
Examples:
  mergetool models list
  mergetool models list --json
""",
    "remove": """\b
Examples:
  mergetool models remove alkahest
""",
}

models = typer.Typer(
    cls=group_of(
        {
            "add": ("models:add", "Give a model a name."),
            "list": ("models:list_", "List the names of models."),
            "remove": ("models:remove", "Remove a name; the files stay."),
        }
    ),
    help="Give models names, list or remove names.\n\nExpressions can then say alkahest instead of a path. Names are kept in your config folder, "
    "or with --here in ./mergetool.toml.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@command(AddModel, prints=("as_json",))
def add(typed: Typed) -> None:
    """Give a model a name."""
    asked = typed.request(AddModel)
    add_model(asked)
    _done(typed, f"{asked.name} = {asked.path}", name=asked.name, path=asked.path)


@command(Request, prints=("as_json",))
def list_(typed: Typed) -> None:
    """List the names of models.

    They are those you gave, the public models that need no registering, and the embedded models (lab.NAME).
    """
    entries, heads = list_models(), ("name", "path", "from")
    if typed.as_json:
        console.print_json({"models": [dict(zip(heads, entry, strict=True)) for entry in entries]})
    else:
        console.table(heads, entries, left=3)


@command(RemoveModel, prints=("as_json",))
def remove(typed: Typed) -> None:
    """Remove a name; the files stay."""
    asked = typed.request(RemoveModel)
    remove_model(asked)
    _done(typed, f"{asked.name} removed", removed=asked.name)


def _done(typed: Typed, text: str, **record: str) -> None:
    if typed.as_json:
        console.print_json(record)
    else:
        console.heading("done", text)
