"""``mergetool demo``; the story itself is told by README's first command, which tests/test_readme.py runs."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mergetool.cli.demo import STEPS
from tests.cli.run import mergetool


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target, words in (("mine", "not empty"), ("file", "not a folder"), ("file/below", "cannot be made")):
        ran = mergetool("demo", "-o", target, cwd=tmp_path)
        assert (ran.code, words in ran.err) == (73, True), ran.err
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"notes.txt"}


@pytest.mark.parametrize("command", sorted({command.split()[0] for _, command, _ in STEPS}))
def test_every_option_of_the_story_is_in_its_commands_help(command: str, tmp_path: Path) -> None:
    out = mergetool(command, "--help", cwd=tmp_path).out
    for _, step, _ in STEPS:
        words = shlex.split(step)
        if words[0] == command:
            assert all(word in out for word in words if word.startswith("-")), step
