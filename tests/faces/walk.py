"""The options of every face, by introspection: name and default, under the names that the Python API uses."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from typing import Any

import typer

import mergetool
from mergetool.cli.main import app
from mergetool.comfyui import NODE_CLASS_MAPPINGS
from mergetool.options.table import Row, rows
from mergetool.recipe import schema

CLI = typer.main.get_command(app)
COMMANDS: Mapping[str, Any] = CLI.commands  # type: ignore[attr-defined]

RECIPES = {"merge": schema.MergeOutput, "diff": schema.Difference, "verify": schema.Pictures}
NODES = {"merge": "MergetoolSave", "diff": "MergetoolExtractLora", "compare": "MergetoolCompare"}

# What a face has for itself: how it prints, and what ComfyUI's folders are.
OWN = {"models", "as_json", "no_progress", "verbose", "schema", "variables", "progress", "folder", "verify", "self"}

# Another name for the same thing, until there is one table of options.
CALLED = {
    "command": {"nonfinite": "non_finite"},
    "recipe": {"set": "multipliers", "from": "keep_from", "merge": "expression", "pictures": "images"},
    "node": {
        "groups": "multipliers",
        "rounding_seed": "seed",
        "name": "output",
        "wanted_change": "target",
        "picture": "plot",
        "model": "expression",
    },
}

Options = dict[str, tuple[str, str]]
"""By the API's name: what the face calls it, and its default as text."""


def faces(operation: str) -> dict[str, Options]:
    """The options of one operation in every face that has it."""
    request = getattr(COMMANDS[operation].callback, "request", None)
    initial = {} if request is None else {row.name: row.initial for row in rows(request).values() if not row.is_needed}
    found: dict[str, dict[str, Any]] = {
        "command": {p.name: initial.get(p.name, p.default) for p in COMMANDS[operation].params}
    }
    if hasattr(mergetool, operation):
        parameters = inspect.signature(getattr(mergetool, operation)).parameters
        found["API"] = {name: parameter.default for name, parameter in parameters.items()}
    if operation in RECIPES:
        fields = RECIPES[operation].model_fields
        found["recipe"] = {field.alias or name: field.default for name, field in fields.items()}
    if operation in NODES:
        inputs: Any = NODE_CLASS_MAPPINGS[NODES[operation]].INPUT_TYPES()  # type: ignore[attr-defined]
        found["node"] = {name: _node_default(*how) for group in inputs.values() for name, how in group.items()}
    return {face: _named(face, options) for face, options in found.items()}


def differences(operation: str) -> set[str]:
    """A line for every option that a face lacks, has under another name, or with another default."""
    found = faces(operation)
    request = getattr(COMMANDS[operation].callback, "request", None)
    table = {} if request is None else rows(request)
    lines = set()
    for option in set().union(*found.values()):
        there = {face: options[option] for face, options in found.items() if option in options}
        missing = [face for face in found if face not in there and not _is_declared(table.get(option), face)]
        lines |= {f"{operation}: {option} is not in the {face}" for face in missing}
        known = {option, *([table[option].key] if option in table else [])}
        lines |= {
            f"{operation}: {option} is {name} in the {face}" for face, (name, _) in there.items() if name not in known
        }
        defaults = {face: default for face, (_, default) in there.items() if default != "required"}
        if len(set(defaults.values())) > 1:
            listed = ", ".join(f"{default} in the {face}" for face, default in defaults.items())
            lines.add(f"{operation}: {option} is by default {listed}")
    return lines


def _is_declared(row: Row | None, face: str) -> bool:
    """Whether the table says why a face has no such option."""
    return row is not None and face.lower() in row.option.missing


def _named(face: str, options: Mapping[str, Any]) -> Options:
    called = CALLED.get(face, {})
    return {called.get(name, name): (name, _text(default)) for name, default in options.items() if name not in OWN}


def _node_default(kind: Any, how: Mapping[str, Any]) -> Any:
    first = kind[0] if isinstance(kind, list) else None
    return how.get("default", None if first in ("as the anchor", "none") else first)


def _text(default: Any) -> str:
    """A default so that the same thing is the same text: nothing is "none", 1% and 0.01 are one number."""
    if default is inspect.Parameter.empty or type(default).__name__ == "PydanticUndefinedType":
        return "required"
    if default is None or default == () or default == "":
        return "none"
    if isinstance(default, str | int | float) and not isinstance(default, bool):
        text = str(default)
        with suppress(ValueError):
            return str(float(Fraction(text.rstrip("%")) / (100 if text.endswith("%") else 1)))
    return str(default)
