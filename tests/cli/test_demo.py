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


@pytest.mark.parametrize("command", sorted({step.command.split()[0] for step in STEPS}))
def test_every_option_of_the_story_is_in_its_commands_help(command: str, tmp_path: Path) -> None:
    out = mergetool(command, "--help", cwd=tmp_path).out
    for step in STEPS:
        words = shlex.split(step.command)
        if words[0] == command:
            assert all(word in out for word in words if word.startswith("-")), step.command


@pytest.mark.first
def test_the_quick_story_says_its_length_and_every_step_and_ends_in_a_report(tmp_path: Path) -> None:
    ran = mergetool("demo", "--quick", "-o", "story", "--no-progress", cwd=tmp_path)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    quick = [step for step in STEPS if step.quick]
    assert lines[0].startswith(f"demo    {len(quick)} commands, about ")
    assert sum(line.startswith("$ mergetool ") for line in lines) == len(quick)
    assert sum(line.startswith("took ") for line in lines) == len(quick)
    assert "<title>bridge.safetensors: passed</title>" in (tmp_path / "story" / "report.html").read_text()
