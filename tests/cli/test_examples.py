"""The first example of every help works as it stands, on models that come with mergetool."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.cli.run import mergetool


def first_example(text: str) -> list[str]:
    found = re.search(r"^\s*mergetool (.+)$", text, re.MULTILINE)
    assert found
    return shlex.split(found[1])


@pytest.mark.parametrize("command", ["merge", "diff", "compare", "convert", "inspect"])
def test_the_first_example_of_a_help_runs(command: str, tmp_path: Path) -> None:
    words = first_example(importlib.import_module(f"mergetool.cli.{command}").EXAMPLES)
    assert mergetool(*words, cwd=tmp_path).code == 0
