"""The common parts of the HTML pages: one self-contained file each, for phone or printer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from mergetool.checkpoint.files import write_file
from mergetool.checkpoint.targets import require_folder
from mergetool.errors import OutputError

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table with a heading over each column. The first column is a name, the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def template(package: str, name: str) -> jinja2.Template:
    """Load a room's template, which may include "style.css" and ``table.html.j2``.

    It imports `table` from the latter.
    """
    import jinja2  # a report that is only printed does without

    def load(wanted: str) -> str:
        place = package if wanted == name else __package__
        return resources.files(place).joinpath("templates", wanted).read_text()

    loader = jinja2.FunctionLoader(load)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, loader=loader)
    return environment.get_template(name)


def require_target(path: Path, *, overwrite: bool) -> None:
    """Raises OutputError, before any work, when the page cannot be written there."""
    require_folder(path.parent)
    if path.is_dir():
        raise OutputError(f'"{path}" is a folder; name a file in it, as in {path}/report.html.')
    if path.exists() and not overwrite:
        raise OutputError(f'"{path}" exists; choose another place with `report`, or replace it with `overwrite`.')


def write(path: Path, text: str) -> None:
    """Write the page, complete or not at all."""
    write_file(path, text.encode(), overwrite=True)
