"""The harnesses of large files catch a reader that keeps only the low bits of a place in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergetool.checkpoint.inputs import InputFile
from tests.hostile import offsets
from tests.hostile.warm import PATCHES, Warm


@pytest.mark.parametrize("bits", [31, 32])
def test_a_command_that_keeps_the_low_bits_of_a_place_is_caught(warm: Warm, tmp_path: Path, bits: int) -> None:
    found = offsets.run(warm, tmp_path, ["merge"], patched=f"{bits}-bit offsets").violations
    for reader in ("mmap", "pread"):
        for place in (1 << bits, (1 << bits) + 8):
            assert f"merge by {reader} with a file at {place}: another output" in found


@pytest.mark.parametrize(("bits", "length"), [(31, offsets.LENGTHS[0]), (32, offsets.LENGTHS[-1])])
def test_a_reader_that_keeps_the_low_bits_of_a_place_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, length: int
) -> None:
    for name in ("read_into", "window"):
        monkeypatch.setattr(InputFile, name, getattr(InputFile, name))  # put back after the test
    PATCHES[f"{bits}-bit offsets"]()
    with offsets.long_tensor(tmp_path / "m.safetensors", length) as path:
        read, mapped = offsets.read_ends(path, length)[-2:]
    assert read != 3
    assert mapped != 3
