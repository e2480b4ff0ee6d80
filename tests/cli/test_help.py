"""Help: it fits 80 columns, no summary is cut, and there are words for it; what the shell completes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mergetool import __version__
from mergetool.arch.families import FAMILIES
from mergetool.cli.epilogs import fitted
from mergetool.cli.main import app
from tests.faces.walk import CLI, commands


def groups(group: Any = CLI, *words: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield words, group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from groups(command, *words, name)


def shown(*words: str) -> str:
    ran = CliRunner().invoke(app, list(words), terminal_width=80)
    assert ran.exit_code == 0, ran.output
    return ran.output


@pytest.mark.parametrize(
    "words", [*(words for words, _ in groups()), *(tuple(name.split()) for name, _ in commands(CLI))]
)
def test_no_line_of_help_is_longer_than_80_columns(words: tuple[str, ...]) -> None:
    assert [line for line in shown(*words, "--help").splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(("words", "group"), [*groups()])
def test_a_commands_summary_is_whole_and_short(words: tuple[str, ...], group: Any) -> None:
    for name, command in group.commands.items():
        summary = command.get_short_help_str(1000)
        assert len(summary) <= 50, f"{' '.join([*words, name])}: {summary}"
        assert command.hidden or f"  {summary}\n" in shown(*words, "--help")


def test_help_and_version_are_words_too() -> None:
    assert shown("help") == shown("--help")
    assert shown("help", "lora", "merge") == shown("lora", "merge", "--help")
    assert shown("version") == shown("--version")
    first, *others = shown("version").splitlines()
    assert first == f"mergetool {__version__}"
    assert [line.split()[0] for line in others] == ["python", "system", "torch", "kernels"]


def test_the_version_can_be_read_by_programs() -> None:
    told = json.loads(shown("version", "--json"))
    assert told["mergetool"] == __version__
    assert told["torch"] == version("torch")
    assert told["python"] == f"{platform.python_version()}, {sys.executable}"


def test_help_of_no_command_names_those_that_there_are() -> None:
    ran = CliRunner().invoke(app, ["help", "lora", "mix"])
    assert ran.exit_code == 2
    assert '"mergetool lora" has no command "mix"; its commands are inspect, bake' in ran.output


def test_the_package_runs_as_a_module() -> None:
    ran = subprocess.run([sys.executable, "-m", "mergetool", "version"], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[0] == f"mergetool {__version__}"


def test_a_long_example_is_broken_before_an_option_and_stays_one_command() -> None:
    line = '  mergetool merge "alkahest + 20 * (artshoot - base)" --protect refiner --dtype fp16 -o out.safetensors'
    broken = fitted(line).splitlines()
    assert len(broken) == 2
    assert broken[0].endswith(" \\")
    assert " ".join(broken).replace("\\ ", "").split() == line.split()


def completed(*words: str, **environment: str) -> list[str]:
    """What a shell offers for the last of some words."""
    asked = {
        "_MERGETOOL_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["mergetool", *words]),
        "COMP_CWORD": str(len(words)),
    }
    program = Path(sys.executable).with_name("mergetool")
    ran = subprocess.run(
        [program], env={**os.environ, **asked, **environment}, capture_output=True, text=True, check=True
    )
    return ran.stdout.split()


def test_registered_models_are_completed(tmp_path: Path) -> None:
    config = {"MERGETOOL_CONFIG_DIR": str(tmp_path)}
    program = Path(sys.executable).with_name("mergetool")
    (tmp_path / "artshoot.safetensors").touch()
    arguments = ["models", "add", "artshoot", tmp_path / "artshoot.safetensors"]
    subprocess.run([program, *arguments], env=os.environ | config, check=True, capture_output=True)
    assert completed("convert", "art", **config) == ["artshoot"]
    assert completed("merge", "x", "--from", "art", **config) == ["artshoot"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("merge", "x", "--protect", "ref"), "refiner"),
        (("merge", "x", "--quant", "fp8"), "fp8-scaled"),
        (("merge", "x", "--rounding", "s"), "stochastic"),
        (("lora", "conv"), "convert"),
    ],
)
def test_groups_words_and_commands_are_completed(words: tuple[str, ...], offered: str) -> None:
    assert completed(*words) == [offered]


def test_the_help_names_every_family_of_models_that_is_known() -> None:
    told = " ".join(shown("--help").split())
    *others, last = (family.name for family in FAMILIES if family.copy_of is None)
    assert f"{', '.join(others)} and {last} by name" in told
