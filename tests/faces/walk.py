"""The options of every face, by looking at the faces themselves: commands, functions, keys of recipes, inputs of nodes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer

import mergetool
from mergetool.api.comparisons import Compare
from mergetool.api.differences import Diff
from mergetool.api.merges import Merge
from mergetool.api.verifications import Verify
from mergetool.cli.main import app
from mergetool.cli.parameters import PRINTING
from mergetool.comfyui import NODE_CLASS_MAPPINGS
from mergetool.comfyui.widgets import values_of
from mergetool.options.table import Face, Row, Table, rows, rows_in
from mergetool.recipe import schema

CLI = typer.main.get_command(app)

# Operations by the words of their commands; a face that does not have one says why.
RECIPES: Mapping[type[Table], tuple[type, ...]] = {
    Merge: (schema.MergeOutput,),
    Diff: (schema.DiffSpec, schema.LoraOutput),
    Verify: (schema.PicturesSpec,),
}
NODES: Mapping[type[Table], str] = {
    Merge: "MergetoolSave",
    Diff: "MergetoolExtractLora",
    Compare: "MergetoolCompare",
}

# What belongs to a face alone.
OWN: Mapping[str, set[str]] = {
    "command": {*PRINTING, "schema", "variables", "context", "help", "models"},
    "api": {"progress"},
    "recipe": {"verify", "diff"},
    "node": {"folder"},
}

# Commands without options.
WITHOUT = {"help", "version"}

# Commands that only show, list or register: Python has other ways to do that.
ONLY_COMMANDS = {"inspect", "methods", "demo", "doctor", "models add", "models list", "models remove"}


@dataclass(frozen=True)
class Operation:
    """One operation: the words of its command, the command, and the table of its options."""

    name: str
    command: Any
    table: type[Table]

    @property
    def function(self) -> Any:
        """The function of the API."""
        functions = (getattr(mergetool, name) for name in mergetool.__all__)
        return next((one for one in functions if getattr(one, "request", None) is self.table), None)

    def faces(self) -> dict[Face, dict[str, Any]]:
        """What each face that has the operation calls its options, with their defaults as the table has them."""
        found: dict[Face, dict[str, Any]] = {"command": self._of_command()}
        if self.function is not None:
            parameters = inspect.signature(self.function).parameters.values()
            found["api"] = {one.name: NEEDED if one.default is one.empty else one.default for one in parameters}
        if self.table in RECIPES:
            found["recipe"] = self._of_recipe()
        if self.table in NODES:
            found["node"] = self._of_node()
        return {
            face: {name: options[name] for name in options if name not in OWN[face]} for face, options in found.items()
        }

    def _of_command(self) -> dict[str, Any]:
        """A command gives nothing for what was not typed: the defaults are the request's."""
        assert all(param.default in (None, False, []) or param.required for param in self.command.params)
        known = rows(self.table)
        return {
            param.name: _initial(known[param.name]) if param.name in known else None for param in self.command.params
        }

    def _of_recipe(self) -> dict[str, Any]:
        by_key = {row.key: row for row in rows(self.table).values()}
        fields = {
            field.alias or name: NEEDED if field.is_required() else field.default
            for kind in RECIPES[self.table]
            for name, field in kind.model_fields.items()  # type: ignore[attr-defined]
        }
        return {by_key[key].name if key in by_key else key: default for key, default in fields.items()}

    def _of_node(self) -> dict[str, Any]:
        inputs = NODE_CLASS_MAPPINGS[NODES[self.table]].INPUT_TYPES()  # type: ignore[attr-defined]
        declared = {name: how for group in inputs.values() for name, (_, how) in group.items()}
        held = {name: how.get("default") for name, how in declared.items()}
        given = values_of(self.table, {name: value for name, value in held.items() if name not in self.needed})
        known = rows(self.table)
        return {name: given.get(name, _initial(known[name]) if name in known else None) for name in declared}

    @property
    def needed(self) -> list[str]:
        """The options without a default."""
        return [name for name, row in rows(self.table).items() if row.is_needed]

    def differences(self) -> list[str]:
        """A line for every option that a face has and the table not, lacks and the table says not why, or has with another default."""
        lines = []
        for face, options in self.faces().items():
            known = rows_in(self.table, face)
            lines += [
                f"{self.name}: {name} of the {face} is not in the table" for name in options.keys() - known.keys()
            ]
            lines += [f"{self.name}: the {face} has not {name}" for name in known.keys() - options.keys()]
            for name in known.keys() & options.keys():
                wanted, default = (_whole(known[name], one) for one in (_initial(known[name]), options[name]))
                if default != wanted:
                    lines.append(f"{self.name}: {name} is by default {default!r} in the {face}, not {wanted!r}")
        return sorted(lines)


NEEDED = "needed"


def operations() -> list[Operation]:
    """Every command that has a table of options."""
    found = [(words, command, getattr(command.callback, "request", None)) for words, command in commands(CLI)]
    return [Operation(words, command, table) for words, command, table in found if table is not None]


def commands(group: Any, *words: str) -> Iterator[tuple[str, Any]]:
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *words, name)
        else:
            yield " ".join([*words, name]), command


def _initial(row: Row) -> Any:
    return NEEDED if row.is_needed else row.initial


def _whole(row: Row, default: Any) -> Any:
    """A default in the one form of the table; no list is an empty one."""
    if default == NEEDED:
        return NEEDED
    return row.value(() if default is None and row.initial == () else default)
