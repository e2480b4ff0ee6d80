"""What is public is a list that someone chose, and importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mergetool


def test_the_list_is_sorted_and_is_what_can_be_had() -> None:
    assert mergetool.__all__ == sorted(mergetool.__all__)
    assert set(mergetool.__all__) == set(mergetool._HOME)


@pytest.mark.parametrize("name", mergetool.__all__)
def test_every_public_name_has_a_docstring_that_promises_something(name: str) -> None:
    documented = getattr(mergetool, name).__doc__
    assert documented
    assert documented.strip().split("\n")[0].rstrip().endswith((".", ";", ":", ","))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mergetool.nothing


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, mergetool; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
