"""The page on installation: what can be run is run, what cannot says why, and no package index is promised."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.run import mergetool
from tests.wheel.builds import ROOT, listed

PAGE = (ROOT / "docs/install.md").read_text("utf-8")


def blocks() -> list[tuple[str, str, str]]:
    """The line before each block of code, its language and its text."""
    lines, found = PAGE.splitlines(), []
    starts = [at for at, line in enumerate(lines) if line.startswith("```")]
    for start, end in zip(starts[::2], starts[1::2], strict=True):
        found.append((lines[start - 1], lines[start][3:], "\n".join(lines[start + 1 : end])))
    return found


def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    shown = [line for _, language, text in blocks() if language == "console" for line in text.splitlines()]
    (line,) = [line for line in shown if line.startswith("$ ")]
    program, *arguments = shlex.split(line.removeprefix("$ "))
    assert program == "mergetool"
    done = mergetool(*arguments, cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "merged.safetensors").exists()


def test_what_is_not_run_says_why() -> None:
    for before, language, text in blocks():
        if language != "console":
            assert re.fullmatch(r"<!-- not run: .+ -->", before), text


@pytest.mark.parametrize(
    "page", [name for name in listed("docs", "README.md", "CONTRIBUTING.md") if name.endswith(".md")]
)
def test_no_page_installs_mergetool_from_an_index(page: str) -> None:
    """None has it: whoever registers the name would be installed."""
    text = (ROOT / page).read_text("utf-8")
    assert not re.search(r"(pip|pipx|uv|uvx)\b[^\n`]*\b(install|run|add|uvx)\s+(-\S+\s+)*['\"]?mergetool\b(?!-)", text)
