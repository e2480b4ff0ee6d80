"""What is made in docs/reference, and how it is put there: whole pages, and tables between markers of a page that people write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from tests.faces import page as options
from tests.reference import containers, errors, families, lora_formats, methods, python, recipe_keys

DOCS = Path(__file__).parents[2] / "docs"

Lines = Callable[[], Iterable[str]]

PAGES: Mapping[str, Lines] = {
    "reference/options.md": options.lines,
    "reference/families.md": families.lines,
    "reference/recipe-keys.md": recipe_keys.lines,
    "reference/recipe.schema.json": recipe_keys.schema_lines,
    "reference/exit-codes.md": errors.lines,
    "reference/python.md": python.lines,
}
"""Whole pages."""

TABLES: Mapping[tuple[str, str], Lines] = {
    ("reference/methods.md", "methods"): methods.lines,
    ("reference/quantised.md", "proofs"): containers.proofs,
    ("reference/quantised.md", "containers"): containers.lines,
    ("reference/lora-dialects.md", "formats"): lora_formats.lines,
}
"""Tables by page and marker, as in ``<!-- table: methods -->``."""


def renewed(page: str, text: str) -> str:
    """The ``text`` of a page with everything in it that is made. Raises ValueError for a table that has no place there."""
    if page in PAGES:
        return "\n".join([*PAGES[page](), ""])
    for (of, name), lines in TABLES.items():
        if of == page:
            start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
            if text.count(start) != 1:
                raise ValueError(f"{page} has {text.count(start)} places for the table {name}, where one is wanted")
            before, _, rest = text.partition(start)
            text = "".join([before, start, *(f"{line}\n" for line in lines()), end, rest.partition(end)[2]])
    return text


def made_pages() -> list[str]:
    """Every page in which something is made."""
    return list(dict.fromkeys([*PAGES, *(page for page, _ in TABLES)]))
