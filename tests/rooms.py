"""docs/pictures/rooms.svg from the import contracts in pyproject.toml: ``python -m tests.rooms``."""

from __future__ import annotations

import ast
import textwrap
import tomllib
from pathlib import Path
from xml.sax.saxutils import escape

from tests.test_first_sentences import first_sentence

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "pictures" / "rooms.svg"

BANDS = (
    ("Faces", "cli", "#e8f0fe"),
    ("Runner", "api", "#fff3d6"),
    ("Operations", "making", "#e7f5ea"),
    ("Engine", "engine", "#fde8e4"),
    ("What to merge", "recipe", "#f3e9fb"),
    ("Files of LoRAs, arithmetic", "adapters", "#e3f4f7"),
    ("Names and bytes", "arch", "#eceff1"),
)
"""Label, highest room and colour of each stripe; the rooms and their order are those of the contract."""

RULE = (
    "A room imports only from rooms below it, or to its right in the same stripe. "
    "° never imports torch. The kernels import none of the rooms."
)

IN_A_ROW, LEFT, RIGHT, GAP, CHARACTER, LINE = 4, 128, 904, 10, 6.2, 14
"""Boxes in a row; edges of the rows, space between boxes, width of a character and height of a line in pixels."""


def contracts() -> dict[str, dict[str, list[str]]]:
    """Import contracts by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return {contract["name"]: contract for contract in project["tool"]["importlinter"]["contracts"]}


def rooms() -> list[str]:
    """All rooms from the highest to the lowest, without ``mergetool.`` in front."""
    layers = contracts()["Rooms import downwards only"]["layers"]
    return [room.strip().removeprefix("mergetool.") for layer in layers for room in layer.split("|")]


def without_torch() -> set[str]:
    """The rooms that never import torch, as wholes."""
    named = contracts()["Rooms that must stay fast never import torch"]["source_modules"]
    return {room.removeprefix("mergetool.") for room in named}


def sentence(path: Path) -> str:
    """The first sentence of the docstring of a package or a module."""
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    docstring = ast.get_docstring(ast.parse(source.read_text("utf-8")))
    assert docstring, f"{source} has no docstring"
    return first_sentence(docstring).replace("``", "").replace("`", "")


def stripes() -> list[tuple[str, str, list[str]]]:
    """Label, colour and rooms of every stripe. Raises ValueError for a stripe whose highest room is no room."""
    order = rooms()
    begins = [order.index(first) for _, first, _ in BANDS]
    ends = [*begins[1:], len(order)]
    return [
        (label, colour, order[begin:end]) for (label, _, colour), begin, end in zip(BANDS, begins, ends, strict=True)
    ]


def row(y: int, named: dict[str, str], left: int = LEFT) -> tuple[list[str], int]:
    """Boxes side by side, names with their sentences, and the height of them."""
    width = (RIGHT - GAP - left - GAP * (len(named) - 1)) // len(named)
    texts = [textwrap.wrap(text, int((width - 20) / CHARACTER)) for text in named.values()]
    height, drawn = 30 + LINE * max(len(lines) for lines in texts), []
    for index, (title, lines) in enumerate(zip(named, texts, strict=True)):
        x = left + index * (width + GAP)
        drawn.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="#ffffff" stroke="#90a4ae"/>'
        )
        drawn.append(f'<text x="{x + 10}" y="{y + 19}" class="room">{escape(title)}</text>')
        for number, line in enumerate(lines):
            drawn.append(f'<text x="{x + 10}" y="{y + 36 + LINE * number}" class="what">{escape(line)}</text>')
    return drawn, height


def picture() -> str:
    """The drawing: a stripe for rooms of one kind, a box for each room."""
    fast, y, body = without_torch(), 46, []
    for label, colour, members in stripes():
        top, boxes = y, []
        for begin in range(0, len(members), IN_A_ROW):
            named = {
                room + ("°" if room in fast else ""): sentence(ROOT / "mergetool" / room)
                for room in members[begin : begin + IN_A_ROW]
            }
            drawn, height = row(y + GAP, named)
            boxes += drawn
            y += height + GAP
        y += GAP
        body.append(f'<rect x="30" y="{top}" width="{RIGHT - 30}" height="{y - top}" rx="8" fill="{colour}"/>')
        for number, line in enumerate(textwrap.wrap(label, 12)):
            body.append(f'<text x="40" y="{top + 29 + 16 * number}" class="band">{escape(line)}</text>')
        body += boxes
        y += GAP
    kernels, height = row(y, {"kernels/mergetool_kernels": sentence(ROOT / "kernels" / "mergetool_kernels")}, left=30)
    bottom = y + height
    size = f'width="{RIGHT + 10}" height="{bottom + 10}" viewBox="0 0 {RIGHT + 10} {bottom + 10}"'
    head = f"""\
<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">
<title>The rooms of mergetool: each imports only from rooms that come after it</title>
<style>
text {{ font-family: system-ui, "DejaVu Sans", Arial, sans-serif; fill: #263238; }}
.room {{ font-size: 14px; font-weight: 700; }} .what {{ font-size: 11px; }}
.band {{ font-size: 13px; font-weight: 700; fill: #546e7a; }}
</style>
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="30" y="28" class="what">{escape(RULE)}</text>
<path d="M14 50 V{bottom - 8} M8 {bottom - 18} L14 {bottom - 6} L20 {bottom - 18}" fill="none" stroke="#546e7a" stroke-width="2"/>"""
    return "\n".join([head, *body, *kernels, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(picture(), "utf-8")
