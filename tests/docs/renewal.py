"""Writing into a page what its commands print, and beside it the pictures that they make."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.docs.pages import Block, Page, Picture, Step
from tests.docs.running import Ran, picture_fault, run


def renew(page: Page) -> list[str]:
    """Renew a page in place. Returns what is wrong with it: its `faults`, and commands that end with another exit code than they should."""
    with tempfile.TemporaryDirectory(prefix="docs-") as scratch:
        folder = Path(scratch)
        ran = list(run(page, folder))
        text = renewed(page, ran)
        if text != page.path.read_text("utf-8"):
            page.path.write_text(text, "utf-8")
        for picture in page.pictures:
            if picture.is_made(folder) and picture_fault(picture, folder):
                _store(picture, folder)
        unmade = [picture_fault(picture, folder) for picture in page.pictures]
    still = (each.fault(page) for each in ran if (each.finished.code != 0) != each.should_fail)
    return [*page.faults(), *filter(None, still), *filter(None, unmade)]


def renewed(page: Page, ran: list[Ran]) -> str:
    """The page's text with what was printed by the commands of its ``console`` blocks."""
    steps: dict[int, list[Step]] = {}
    for each in ran:
        steps.setdefault(each.block.start, []).append(each.renewed)
    lines = list(page.lines)
    for block in reversed(page.blocks):
        if block.language == "console" and block.start in steps:
            lines[block.start : block.start + len(block.lines)] = _lines(block, steps[block.start])
    return "".join(f"{line}\n" for line in lines)


def _lines(block: Block, steps: list[Step]) -> list[str]:
    found: list[str] = []
    for step in steps:
        found += [f"$ {step.typed[0]}", *step.typed[1:], *step.shown]
    return [f"{block.indent}{line}".rstrip() for line in found]


def _store(picture: Picture, folder: Path) -> None:
    picture.place.parent.mkdir(exist_ok=True)
    picture.composed(folder).save(picture.place, optimize=True, quality=88)
