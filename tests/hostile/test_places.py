"""Nothing in a file leads the program to another place of the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergetool.checkpoint import inputs, reader, system
from tests.hostile import escapes, links, names

pytestmark = pytest.mark.loaded


@pytest.mark.usefixtures("strace")
def test_no_shard_name_opens_anything_outside_its_folder(tmp_path: Path) -> None:
    escapes.run(tmp_path / "cases").require(150)


@pytest.mark.usefixtures("strace")
def test_a_check_that_only_looks_for_absolute_names_is_caught(tmp_path: Path) -> None:
    found = escapes.run(tmp_path / "cases", hole="only slashes at the start").violations
    assert any("secret.safetensors" in violation for violation in found)


@pytest.mark.parametrize("case", links.CASES, ids=lambda case: case.name)
def test_links_and_odd_files(tmp_path: Path, case: links.Case) -> None:
    if "device" in case.name and os.geteuid() != 0:
        pytest.skip("making a device needs root")
    assert case.fault(tmp_path) is None


def test_a_program_that_takes_any_linked_json_for_a_config_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "leads_out", lambda path: False)
    assert links.run(tmp_path).violations == ["a config that links to somebody's settings: opened"]


def test_a_program_that_opens_what_is_no_file_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_require_regular", lambda status, path: None)
    names = {violation.split(":")[0] for violation in links.run(tmp_path).violations}
    assert {"a FIFO", "a socket", "a character device"} <= names


def test_a_program_that_waits_for_a_writer_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "_require_regular", lambda status, path: None)
    monkeypatch.setattr(system, "open_input", lambda path: os.open(path, os.O_RDONLY))
    monkeypatch.setattr(links, "HANG", 2)  # nobody ever writes into it: waiting longer would show no more
    case = next(case for case in links.CASES if case.name == "a FIFO")
    assert case.fault(tmp_path) == "waits"


def test_a_program_that_leaves_a_refused_file_open_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(system, "close", left.append)
    found = links.run(tmp_path).violations
    for fd in left:
        os.close(fd)
    assert "an empty file: left open" in found


def test_random_names_that_pass_stay_in_the_folder() -> None:
    names.run(20_000, seed=21).require(20_000)


def test_a_check_that_only_looks_for_slashes_is_caught() -> None:
    assert names.run(20_000, check=lambda name, end: "a slash" if "/" in name else None).violations
