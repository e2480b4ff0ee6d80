"""A page's blocks, run from its top to its end."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests import standins
from tests.docs.agreement import disagreement, merged
from tests.docs.pages import Block, Page, Picture, Step
from tests.docs.shell import Finished, Shell, ShellWithStandIns


@dataclass(frozen=True)
class Ran:
    """A command of a block, and what became of it."""

    block: Block
    step: Step
    finished: Finished
    should_fail: bool = False

    def fault(self, page: Page) -> str:
        """What is wrong with it, empty where nothing is."""
        place = f"{page.name}:{self.block.start}: $ {self.step.command}\n"
        if (self.finished.code != 0) != self.should_fail:
            wanted = "another than 0" if self.should_fail else "0"
            return "\n".join([f"{place}exit code {self.finished.code}, wanted {wanted}", *self.finished.lines])
        if self.block.language != "console":
            return ""
        difference = disagreement(self.step.shown, self.finished.lines)
        return place + difference if difference else ""

    @property
    def renewed(self) -> Step:
        return dataclasses.replace(self.step, shown=merged(self.step.shown, self.finished.lines))


def run(page: Page, folder: Path) -> Iterator[Ran]:
    """Run what the page says in ``folder``, which holds its files afterwards."""
    shell, files = Shell(folder), dict[str, str]()
    for number, block in enumerate(page.blocks):
        if block.note.key == "not run":
            continue
        if block.note.key == "file":
            files[block.note.value] = block.text
            (folder / block.note.value).write_text(block.text, "utf-8")
        elif block.language == "console":
            yield from _commands(block, shell)
        elif block.language in ("sh", "python"):
            place = folder / f".block-{number}"
            place.mkdir()
            beside = ShellWithStandIns(place, files)
            yield from _commands(block, beside) if block.language == "sh" else [_program(block, beside)]


def _commands(block: Block, shell: Shell) -> Iterator[Ran]:
    steps = block.steps
    for step in steps:
        yield Ran(block, step, shell.run(step.command), block.note.key == "fails" and step is steps[-1])


def _program(block: Block, shell: Shell) -> Ran:
    standins.provide(shell.folder, [word for word in re.findall(r"[\w-]+", block.text) if word in standins.NAMES])
    (shell.folder / "program.py").write_text(block.text, "utf-8")
    step = Step((f"{sys.executable} program.py",))
    return Ran(block, step, shell.run(step.command))


def picture_fault(picture: Picture, folder: Path) -> str:
    """How a picture of the page differs from the one that its commands made in ``folder``, empty where it does not.

    It may be stored with losses, and processors differ in last digits: pixels are compared on average, to 8 of 255.
    """
    import numpy as np
    from PIL import Image

    if not picture.is_made(folder):
        return f"{picture.place.name}: the page's commands do not make {' '.join(picture.made)}"
    if not picture.place.exists():
        return f"{picture.place.name} is missing"
    made = picture.composed(folder)
    with Image.open(picture.place) as shown:
        if shown.size != made.size:
            return f"{picture.place.name} is {shown.size}, what is made is {made.size}"
        apart = np.abs(np.asarray(shown.convert("RGB"), float) - np.asarray(made, float)).mean()
    return (
        ""
        if apart <= 8
        else f"{picture.place.name} is not {' '.join(picture.made)}: {apart:.1f} of 255 apart on average"
    )
