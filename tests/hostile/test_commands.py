"""Every command against inputs that would run code or steer the terminal; each harness also meets a program that has the hole."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from tests.hostile import injections, pickles, terminal
from tests.hostile.warm import Warm


def test_no_pickle_is_loaded_by_any_command(warm: Warm, tmp_path: Path) -> None:
    assert len(pickles.contents(tmp_path)) >= 30
    pickles.run(warm, tmp_path).require(600)


def test_a_program_that_falls_back_to_torch_load_is_caught(warm: Warm, tmp_path: Path) -> None:
    found = pickles.run(warm, tmp_path, step=5, patched="load pickles")
    assert any("loaded the pickle" in violation for violation in found.violations)


@pytest.mark.parametrize("kind", ["pickle, protocol 0", "pickle, protocol 5", "text pickle"])
def test_the_canary_works(tmp_path: Path, kind: str) -> None:
    pickle.loads(pickles.contents(tmp_path / "canary")[kind])
    assert (tmp_path / "canary").is_dir()


@pytest.mark.first
def test_no_file_steers_the_terminal(warm: Warm, tmp_path: Path) -> None:
    assert len(terminal.strings()) >= 100
    terminal.run(warm, tmp_path).require(2000)


def test_a_program_that_prints_names_as_they_are_is_caught(warm: Warm, tmp_path: Path) -> None:
    assert any(
        "prints" in violation for violation in terminal.run(warm, tmp_path, step=40, patched="print raw").violations
    )


@pytest.mark.first
def test_no_text_of_a_file_is_run_imported_or_fetched(warm: Warm, tmp_path: Path) -> None:
    injections.run(warm, tmp_path).require(3600)


def test_a_program_that_imports_what_metadata_names_is_caught(warm: Warm, tmp_path: Path) -> None:
    found = injections.run(warm, tmp_path, step=9, patched="trust names", carriers=["files"])
    assert any("did import" in violation for violation in found.violations)


@pytest.mark.parametrize(
    ("patched", "fault"),
    [
        ("obey tags", "did os.system"),
        ("evaluate texts", "did exec"),
        ("expand the environment", "says what the environment says"),
    ],
)
def test_a_reader_of_recipes_that_obeys_them_is_caught(warm: Warm, tmp_path: Path, patched: str, fault: str) -> None:
    found = injections.run(warm, tmp_path, step=9, patched=patched, carriers=["recipes"])
    assert any(fault in violation for violation in found.violations)
