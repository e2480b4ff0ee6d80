"""Nothing in a file leads the program to another place of the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hostile import escapes, links, names


def test_no_shard_name_opens_anything_outside_its_folder(tmp_path: Path) -> None:
    escapes.run(tmp_path / "cases").require(150)


def test_a_check_that_only_looks_for_absolute_names_is_caught(tmp_path: Path) -> None:
    found = escapes.run(tmp_path / "cases", hole="only slashes at the start").violations
    assert any("secret.safetensors" in violation for violation in found)


@pytest.mark.parametrize("case", links.CASES, ids=lambda case: case.name)
def test_links_and_odd_files(tmp_path: Path, case: links.Case) -> None:
    path = case.make(tmp_path)
    before = os.listdir("/proc/self/fd")
    assert links.opened_within_a_second(path) is case.verdict
    assert os.listdir("/proc/self/fd") == before


def test_random_names_that_pass_stay_in_the_folder() -> None:
    names.run(20_000, seed=21).require(20_000)


def test_a_check_that_only_looks_for_slashes_is_caught() -> None:
    assert names.run(20_000, check=lambda name, end: "a slash" if "/" in name else None).violations
