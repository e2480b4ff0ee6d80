"""docs/reference/options.md from the table of options; ``python -m tests.reference`` writes it."""

from __future__ import annotations

from collections.abc import Iterator

from mergetool.cli import console
from mergetool.options.kinds import Choice
from mergetool.options.table import Face, Row, rows
from tests.faces.walk import NODES, RECIPES, Operation, operations

HEAD = """\
# Options

Made from the table of options (`mergetool/options/`), of which the command line, the functions of Python, the keys of a recipe and the inputs of
ComfyUI's nodes are made too. An option has one name, one default and one meaning in all of them; a value that it does not take is refused everywhere, in the
same words, before any work.

*Python* is the parameter's name, and that of a node's input; *recipe* is the key, where a recipe has it. A dash says that a face has not the option; why stands below the tables.
"""


def lines() -> Iterator[str]:
    """The page."""
    yield from HEAD.splitlines()
    whys: dict[str, set[str]] = {}
    for operation in operations():
        console.speak_of(operation.table)
        yield from ["", f"## {operation.name}", ""]
        yield from _table(operation)
        for row in rows(operation.table).values():
            for face, why in row.option.missing.items():
                whys.setdefault(f"{FACES[face]}: {why}", set()).add(f"`{row.name}`")
    yield from ["", "## What a face has not", ""]
    for why, names in sorted(whys.items()):
        yield f"- {why}: {', '.join(sorted(names))}"


FACES: dict[Face, str] = {
    "command": "The command line",
    "api": "Python",
    "recipe": "A recipe",
    "node": "A node",
}


def _table(operation: Operation) -> Iterator[str]:
    has_recipe, has_node = operation.table in RECIPES, operation.table in NODES
    columns = ["command line", "Python", *(["recipe"] if has_recipe else []), *(["node"] if has_node else [])]
    yield f"| {' | '.join([*columns, 'default', 'what it says'])} |"
    yield f"|{'---|' * (len(columns) + 2)}"
    for row in rows(operation.table).values():
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
