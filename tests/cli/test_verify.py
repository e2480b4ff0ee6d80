"""``mergetool verify`` as a user runs it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.run import mergetool
from tests.families import checkpoint


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    for seed, name in enumerate(["alk", "a", "b"]):
        checkpoint(tmp_path / f"{name}.safetensors", variant=seed)
        assert mergetool("models", "add", name, f"{name}.safetensors", cwd=tmp_path).code == 0
    ran = mergetool("merge", "alk + 20 * (a - b)", "--protect", "refiner", "-o", "out.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    return tmp_path / "out.safetensors"


def test_a_sound_merge_passes(merged: Path) -> None:
    ran = mergetool("verify", merged.name, cwd=merged.parent)
    assert (ran.code, ran.err) == (0, "")
    assert "recipe  alk + 20*(a - b)" in ran.out
    assert "\nsound   " in ran.out


def test_a_damaged_merge_fails_with_code_one_and_names_the_tensor(merged: Path) -> None:
    data = bytearray(merged.read_bytes())
    data[-1] ^= 64
    merged.write_bytes(data)
    ran = mergetool("verify", merged.name, "--json", cwd=merged.parent)
    assert ran.code == 1
    assert (ran.json["sound"], len(ran.json["differing"])) == (False, 1)
    assert ran.err == "mergetool: out.safetensors is not what its recipe says.\n"


def test_an_input_that_moved_is_named_and_can_be_given(merged: Path) -> None:
    folder = merged.parent
    mergetool("models", "remove", "a", cwd=folder)
    (folder / "a.safetensors").rename(folder / "z.safetensors")
    assert mergetool("verify", merged.name, cwd=folder).code == 66
    assert mergetool("verify", merged.name, "--input", "a=z.safetensors", cwd=folder).code == 0


def test_inputs_are_pairs(merged: Path) -> None:
    ran = mergetool("verify", merged.name, "--input", "a", cwd=merged.parent)
    assert (ran.code, "NAME=MODEL" in ran.err) == (2, True)
