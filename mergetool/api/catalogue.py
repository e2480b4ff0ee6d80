"""Describe a model's file, keep the names of models, and list the merge methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from mergetool.api.events import Events, Request
from mergetool.options.kinds import Flag, ModelName, String
from mergetool.options.table import Option

if TYPE_CHECKING:
    from mergetool.methods import Method


@dataclass(frozen=True)
class Inspect(Request):
    """A file or folder to be described."""

    model: Annotated[
        str,
        Option(
            help="A registered name, a file, a folder, or hf://org/repo.", kind=ModelName(stored=True), argument=True
        ),
    ]
    with_hash: Annotated[
        bool,
        Option(
            help="Read the whole file and show its SHA-256, as model sites do.",
            section="Output",
            kind=Flag(),
            flag="hash",
        ),
    ] = False


@dataclass(frozen=True)
class FindMethods(Request):
    """One merge method, or all."""

    name: Annotated[str | None, Option(help="The method to explain.", kind=String("NAME"), argument=True)] = None


@dataclass(frozen=True)
class AddModel(Request):
    """A name for a model."""

    name: Annotated[
        str, Option(help="The new name: letters, digits, dots, - and _.", kind=String("NAME"), argument=True)
    ]
    path: Annotated[
        str,
        Option(
            help="A file, a folder, or hf://org/repo[/file][@revision].",
            kind=ModelName("PATH", stored=True),
            argument=True,
        ),
    ]
    here: Annotated[
        bool,
        Option(help="Write ./mergetool.toml instead of the list in your config folder.", section="Output", kind=Flag()),
    ] = False


@dataclass(frozen=True)
class RemoveModel(Request):
    """A name to be forgotten."""

    name: Annotated[str, Option(help="A registered name.", kind=String("NAME"), argument=True)]


def run_inspect(asked: Inspect, events: Events) -> Mapping[str, str]:
    """Open a model and show it through `Events.done`. Returns the SHA-256 of its files by name, where asked for."""
    from mergetool import models

    with models.open_model(asked.model, names_only=True) as opened:
        hashes: dict[str, str] = {}
        if asked.with_hash:
            with events.progress("hash", sum(file.size for file in opened.checkpoint.files)) as advance:
                hashes = dict(opened.checkpoint.sha256(progress=advance))
        events.done(opened, hashes)
        return hashes


def find_methods(asked: FindMethods) -> tuple[Sequence[Method], Sequence[str]]:
    """Find methods, and the packages whose methods cannot be had.

    Sentences say why. Raises UsageError for a name that is no method's.
    """
    from mergetool.methods import find, listing

    return ([find(asked.name)], []) if asked.name else listing()


def list_models() -> list[tuple[str, str, str]]:
    """List the name, place and origin of every model that has a name.

    An origin is registered, of the catalogue, or embedded.
    """
    from mergetool import models

    entries = [(entry.name, entry.path, str(entry.origin)) for entry in models.listing()]
    return entries + [(name, str(models.resolve(name).path), "embedded") for name in models.embedded()]


def add_model(asked: AddModel) -> None:
    """Register a name."""
    from mergetool import models

    models.add(asked.name, asked.path, "here" if asked.here else "user")


def remove_model(asked: RemoveModel) -> None:
    """Forget a name; the files stay."""
    from mergetool import models

    models.remove(asked.name)
