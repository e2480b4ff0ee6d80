"""What of a page is run: its code blocks, and the pictures that its commands make."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).parents[2]

LANGUAGES = ("console", "sh", "bat", "powershell", "python", "text", "yaml", "json", "toml")
"""The languages that a block may have."""

TILE, GAP = 192, 8
"""Pixels of a picture that stands beside others, and between two."""

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>```+)(?P<language>.*)")
_NOTE = re.compile(r"<!-- (?P<key>not run|file|fails|made)(?:: (?P<value>.+?))? -->")
_PICTURE = re.compile(r"!\[[^\]]*\]\((?P<path>[^)]+)\)")
_MYST = re.compile(r"\{.+\}")
_COMMAND = re.compile(r"(\$ |mergetool |python -m |pip )")


@dataclass(frozen=True)
class Note:
    """The comment before a block or picture: its key, and what stands after the colon."""

    key: str = ""
    value: str = ""


@dataclass(frozen=True)
class Step:
    """A command as it is typed, over one line or several, and the lines that the page shows as its output."""

    typed: tuple[str, ...]
    shown: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        return "\n".join(self.typed)


@dataclass(frozen=True)
class Block:
    """A code block: its language, its lines, the number of its first line in the page, and the comment before it."""

    language: str
    lines: tuple[str, ...]
    start: int
    indent: str
    note: Note

    @property
    def steps(self) -> list[Step]:
        """The commands of a ``console`` or ``sh`` block."""
        return list(_console(self.lines) if self.language == "console" else _shell(self.lines))

    @property
    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


@dataclass(frozen=True)
class Picture:
    """A picture of the page that its commands make: where the page shows it from, and the files in the page's folder."""

    place: Path
    made: tuple[str, ...]

    def is_made(self, folder: Path) -> bool:
        """Whether ``folder`` has all of its files."""
        return all((folder / name).exists() for name in self.made)

    def composed(self, folder: Path) -> Image.Image:
        """The picture as ``folder`` has it: one file as it is, several enlarged and side by side."""
        from PIL import Image

        found = [Image.open(folder / name).convert("RGB") for name in self.made]
        if len(found) == 1:
            return found[0]
        side = [each.resize((TILE, TILE), Image.Resampling.NEAREST) for each in found]
        sheet = Image.new("RGB", ((TILE + GAP) * len(side) - GAP, TILE), "white")
        for number, each in enumerate(side):
            sheet.paste(each, ((TILE + GAP) * number, 0))
        return sheet


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def lines(self) -> list[str]:
        return self.path.read_text("utf-8").splitlines()

    @cached_property
    def blocks(self) -> list[Block]:
        return list(self._blocks())

    def _blocks(self) -> Iterator[Block]:
        number = 0
        while number < len(self.lines):
            opened = _FENCE.fullmatch(self.lines[number])
            number += 1
            if not opened:
                continue
            start, indent = number, opened["indent"]
            while self.lines[number].strip() != opened["ticks"]:
                number += 1
            if not _MYST.match(opened["language"]):
                found = tuple(line.removeprefix(indent) for line in self.lines[start:number])
                yield Block(opened["language"], found, start, indent, self._note(start - 1))
            number += 1

    @property
    def pictures(self) -> list[Picture]:
        """The pictures that have a comment ``made: FILE``."""
        found = []
        for number, line in enumerate(self.lines):
            picture = _PICTURE.match(line.strip())
            note = self._note(number)
            if picture and note.key == "made":
                found.append(Picture((self.path.parent / picture["path"]).resolve(), tuple(note.value.split())))
        return found

    def _note(self, number: int) -> Note:
        """The comment in the line before line ``number``, or before the blank lines there."""
        above = next((line for line in reversed(self.lines[:number]) if line.strip()), "")
        found = _NOTE.fullmatch(above.strip())
        return Note(found["key"], found["value"] or "") if found else Note()

    def faults(self) -> list[str]:
        """What of the page would escape the run: blocks without a language, commands in blocks of texts, empty reasons."""
        said = []
        commands = [
            step.command for block in self.blocks for step in block.steps if block.language in ("console", "sh")
        ]
        for block in self.blocks:
            place = f"{self.name}:{block.start}"
            if block.language not in LANGUAGES:
                said.append(f"{place}: a block's language is one of {', '.join(LANGUAGES)}, not {block.language!r}")
            if block.note.key == "not run" and not block.note.value:
                said.append(f"{place}: why is the block not run?")
            is_text = block.language == "text" and block.note.key not in ("file", "not run")
            if is_text and any(_COMMAND.match(line.strip()) for line in block.lines):
                said.append(f"{place}: a block of text has a command, which is never run")
            if block.language in ("yaml", "json", "toml") and block.note.key not in ("file", "not run"):
                said.append(
                    f"{place}: a {block.language} block is a file (<!-- file: NAME -->) or is not run, with the reason"
                )
            if block.language in ("bat", "powershell") and block.note.key != "not run":
                said.append(f"{place}: a {block.language} block is never run; say why, as <!-- not run: REASON -->")
            if block.note.key == "file" and not any(block.note.value in command for command in commands):
                said.append(f"{place}: no command of the page uses {block.note.value}")
        return said


def pages() -> list[Page]:
    """README and everything below docs."""
    built = ROOT / "docs" / "_build"
    return [
        Page(path) for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if built not in path.parents
    ]


def _console(lines: tuple[str, ...]) -> Iterator[Step]:
    typed: list[str] = []
    shown: list[str] = []
    for line in lines:
        if typed and not shown and typed[-1].endswith("\\"):
            typed.append(line)
        elif line.startswith("$ "):
            if typed:
                yield Step(tuple(typed), tuple(shown))
            typed, shown = [line.removeprefix("$ ")], []
        else:
            shown.append(line)
    if typed:
        yield Step(tuple(typed), tuple(shown))


def _shell(lines: tuple[str, ...]) -> Iterator[Step]:
    typed: list[str] = []
    for line in lines:
        if not typed and (not line.strip() or line.startswith("#")):
            continue
        typed.append(line)
        if not line.endswith("\\"):
            yield Step(tuple(typed))
            typed = []
