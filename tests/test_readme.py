"""README's two commands for a clone; `tests.docs` runs the others."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def start_commands() -> list[str]:
    section = README.split("<!-- start -->")[1].split("<!-- end -->")[0]
    return [line for line in section.splitlines() if line.startswith("python3 ")]


def test_readme_begins_with_two_commands_that_set_up_from_nothing() -> None:
    assert len(start_commands()) == 2
    assert all(command.startswith("python3 -m venv .venv && .venv/bin/pip install") for command in start_commands())


@pytest.mark.first
def test_the_first_command_tells_the_story_and_ends_in_a_report(tmp_path: Path) -> None:
    """Everything after the installation, with this environment's program."""
    command = shlex.split(start_commands()[0].rsplit("&& ", 1)[1])
    assert command[:2] == [".venv/bin/mergetool", "demo"]
    done = subprocess.run(
        [Path(sys.executable).with_name("mergetool"), *command[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "demo"
    assert f"report  {out / 'report.html'}" in done.stdout
    assert "<title>bridge.safetensors: passed</title>" in (out / "report.html").read_text()
    assert "<title>naive.safetensors: failed</title>" in (out / "naive.html").read_text()
    for name in ("bridge.safetensors", "turbo-minus-alkahest.safetensors", "strengths/sheet.png", "lora/sheet.png"):
        assert (out / name).stat().st_size > 10_000, name


def test_the_second_command_is_what_runs_these_tests() -> None:
    assert start_commands()[1].endswith(".venv/bin/python -m pytest")


def test_no_document_names_what_is_outside_the_project() -> None:
    for path in ROOT.rglob("*"):
        if path.suffix in {".md", ".py", ".toml"} and not {".venv", ".git", "demo"} & set(path.parts):
            assert "../sh" + "ared" not in path.read_text(), path
