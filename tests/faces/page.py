"""docs/reference/options.md from the table of options; ``python -m tests.reference`` writes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergetool.cli import console
from mergetool.options.kinds import Choice
from mergetool.options.table import SECTIONS, Face, Row, rows
from tests.faces.walk import NODES, RECIPES, Operation, operations

HEAD = """\
# Options

This page is made from the table of options (`mergetool/options/`). The command line, the functions of Python, the keys of a recipe and the inputs of ComfyUI's
nodes come from the same table: an option has one name, one default and one meaning in all of them, and all refuse a wrong value in the same words before any
work.

*Python* has the parameter's name, which is also that of a node's input; *recipe* has the key. A dash means that the option is missing there; the end of the page says why.
"""


def lines() -> Iterator[str]:
    """The page."""
    yield from HEAD.splitlines()
    whys: dict[str, set[str]] = {}
    for operation in operations():
        console.speak_of(operation.table)
        yield from ["", f"## {operation.name}"]
        yield from _tables(operation)
        for row in rows(operation.table).values():
            for face, why in row.option.missing.items():
                whys.setdefault(f"{FACES[face]}: {why}", set()).add(f"`{row.name}`")
    yield from ["", "## Options that are missing somewhere", ""]
    for why, names in sorted(whys.items()):
        yield f"- {why}: {', '.join(sorted(names))}"


FACES: dict[Face, str] = {
    "command": "The command line",
    "api": "Python",
    "recipe": "A recipe",
    "node": "A node",
}


def _tables(operation: Operation) -> Iterator[str]:
    """A table for the arguments, then one for each section that has options."""
    for section in ("", *SECTIONS):
        held = [row for row in rows(operation.table).values() if row.option.section == section]
        if held:
            yield from ["", f"**{section or 'Arguments'}**", ""]
            yield from _table(operation, held)


def _table(operation: Operation, held: Sequence[Row]) -> Iterator[str]:
    has_recipe, has_node = operation.table in RECIPES, operation.table in NODES
    columns = ["command line", "Python", *(["recipe"] if has_recipe else []), *(["node"] if has_node else [])]
    yield f"| {' | '.join([*columns, 'default', 'what it does'])} |"
    yield f"|{'---|' * (len(columns) + 2)}"
    for row in held:
        cells = [_flag(row), f"`{row.name}`"]
        cells += [f"`{row.key}`" if "recipe" not in row.option.missing else "-"] if has_recipe else []
        cells += ["yes" if "node" not in row.option.missing else "-"] if has_node else []
        yield f"| {' | '.join([*cells, _default(row), _help(row)])} |"


def _flag(row: Row) -> str:
    if row.option.argument:
        return f"`{row.option.kind.metavar}`".replace("|", "\\|")
    names = (row.option.short, row.flag, row.option.also and f"--{row.option.also}")
    return f"`{', '.join(filter(None, names))}`"


def _default(row: Row) -> str:
    if row.is_needed:
        return "needed"
    words = {"None": "none", "False": "no", "()": "none"}
    said = row.option.default or words.get(repr(row.initial), str(row.initial))
    return console.spelled(said).replace("|", "\\|")


def _help(row: Row) -> str:
    words = f" One of {', '.join(row.option.kind.words)}." if isinstance(row.option.kind, Choice) else ""
    return f"{console.spelled(row.option.help)}{words}".replace("|", "\\|")
