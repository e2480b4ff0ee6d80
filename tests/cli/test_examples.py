"""Every example of a command's help runs as it stands, in a folder with small models under the names that it uses."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.run import mergetool
from tests.faces.walk import CLI, commands
from tests.standins import provide

WITHOUT_EXAMPLES = {"help", "version", "lora subtract"}

ELSEWHERE = {
    "mergetool demo",
    "mergetool demo --quick",
    "mergetool demo -o story --no-progress",
    "mergetool verify out.safetensors",
    'mergetool sample "a knight" --base ./Z-Image --refiner ./Z-Image-Turbo --upscale 4x-UltraSharp.safetensors -o knight.png',
}
"""What takes minutes: tests/test_readme.py runs the demo, which verifies a merge with all its pictures. Upscalers need spandrel, which
tests/sampler/test_upscaler.py has in its own process."""


def examples(epilog: str) -> list[str]:
    """The commands that a help shows, each in one line."""
    joined = re.sub(r"\s*\\\n\s*", " ", epilog)
    return re.findall(r"^  (mergetool .+)$", joined, re.MULTILINE)


def shown() -> Iterator[str]:
    for _, command in commands(CLI):
        yield from examples(command.epilog or "")


@pytest.mark.parametrize("line", sorted({*shown()} - ELSEWHERE), ids=str)
def test_an_example_of_a_help_runs(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)[1:]
    provide(tmp_path, words)
    ran = mergetool(*words, cwd=tmp_path)
    assert (ran.err, ran.code) == ("", 0)


def test_every_command_has_examples() -> None:
    without = {name for name, command in commands(CLI) if not examples(command.epilog or "")}
    assert without == WITHOUT_EXAMPLES


def test_the_examples_that_run_elsewhere_are_shown() -> None:
    assert {*shown()} >= ELSEWHERE
