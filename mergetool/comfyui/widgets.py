"""Nodes' inputs from the table of options: a row is a widget or a link. Their values become a request of the API."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from mergetool.comfyui import host, links
from mergetool.options import kinds
from mergetool.options.table import Row, Table, rows_in

T = TypeVar("T", bound=Table)

EXACT = 2**53 - 1
"""JavaScript's numbers are exact up to here; a number that may be larger is a text. ComfyUI's page would also draw a new value of a
number called seed after every run."""

LINKED = "linked"
"""The stand-in for the value of a link, before a workflow runs."""


def inputs(table: type[Table], *, linked: Collection[str], daily: Collection[str], own: Mapping[str, Any]) -> Any:
    """INPUT_TYPES for a request: ``linked`` rows, ``daily`` rows, the node's ``own``, the rest.

    The rest are advanced inputs.
    """
    rows = rows_in(table, "node")
    needed = {name: (links.MODEL, {"tooltip": tooltip(row)}) for name, row in rows.items() if row.is_needed}
    given = {name: (links.MODEL, {"tooltip": tooltip(rows[name])}) for name in linked if name not in needed}
    shown = {name: widget(rows[name]) for name in daily}
    rest = {name: widget(row) for name, row in rows.items() if name not in {*needed, *given, *shown, *own}}
    hidden = {name: (kind, how | {"advanced": True}) for name, (kind, how) in rest.items()}
    return {"required": needed | dict(own), "optional": shown | given | hidden}


def widget(row: Row) -> tuple[Any, dict[str, Any]]:
    """A row as ComfyUI's page shows it."""
    kind, said = row.option.kind, {"tooltip": tooltip(row)}
    if isinstance(kind, kinds.Flag):
        return "BOOLEAN", {"default": row.initial, **said}
    if isinstance(kind, kinds.Choice):
        nothing = [] if row.initial is not None else [_unset_text(row)]
        return [*nothing, *kind.words], {"default": (nothing or [row.initial])[0], **said}
    if isinstance(kind, kinds.Integer) and row.initial is not None and kind.most <= EXACT:
        return "INT", {"default": row.initial, "min": kind.least, "max": kind.most, **said}
    if isinstance(kind, kinds.Number | kinds.Share) and isinstance(row.initial, float):
        # Without "round" ComfyUI's page rounds what is typed to the step.
        return "FLOAT", {"default": row.initial, **_bounds(kind), "step": 0.001, "round": False, **said}
    if kind.many:
        return "STRING", {"default": "", "multiline": True, "placeholder": f"{kind.metavar}, one a line", **said}
    text = _unset_text(row) if row.initial is None else row.initial
    return "STRING", {
        "default": ",".join(f"{number:g}" for number in text) if isinstance(text, tuple) else str(text),
        **said,
    }


def _bounds(kind: kinds.Kind) -> dict[str, float]:
    least = max(kind.least, kind.above) if isinstance(kind, kinds.Number) else 0.0
    most = kind.most if isinstance(kind, kinds.Number) else 1e6
    return {name: bound for name, bound in (("min", least), ("max", most)) if math.isfinite(bound)}


def _unset_text(row: Row) -> str:
    """The text for no value in a widget: a word where there are words, or where an empty text is a value."""
    kind = row.option.kind
    is_word = isinstance(kind, kinds.Choice) or (isinstance(kind, kinds.String) and kind.empty)
    return (row.option.default or "none") if is_word else ""


def tooltip(row: Row) -> str:
    """Explain a row and its default in one line."""
    default = f" [default: {row.option.default}]" if row.option.default else ""
    return host.spelled(row.option.help + default)


def request(table: type[T], held: Mapping[str, Any]) -> T:
    """The request that widgets and links make; names that are no rows are not looked at. Raises UsageError."""
    return table(**values_of(table, held))


def values_of(table: type[Table], held: Mapping[str, Any]) -> dict[str, Any]:
    """The values of rows in widgets and links, without unset ones. Raises UsageError."""
    values = {}
    for name, row in rows_in(table, "node").items():
        value = held.get(name)
        if value is None or (row.initial is None and value == _unset_text(row)):
            continue
        if row.option.kind.many and isinstance(value, str):
            value = [line.strip() for line in value.splitlines() if line.strip()]
        values[name] = row.read(value)
    return values


def check(table: type[Table], held: Mapping[str, Any]) -> None:
    """Raise the errors of `request` for the widgets' values, before anything runs.

    What is linked is None, and not known yet.
    """
    needed = {name: LINKED for name, row in rows_in(table, "node").items() if row.is_needed}
    values = values_of(table, {**held, **needed})
    if all(value is not None for name, value in held.items() if name not in needed):
        table(**values)
