"""Fetching the programs that other tests are judged by."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.oracles import OracleMissingError, fetching, pip_target


def test_what_cannot_be_fetched_is_one_sentence_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGETOOL_ORACLES_DIR", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        OracleMissingError,
        match=r"^pip cannot fetch parrots, .*\(ERROR: .*\); give pip .* einops==0\.8\.2, or set MERGETOOL_ORACLES_DIR",
    ) as raised:
        pip_target("parrots", ["einops==0.8.2 --hash=sha256:" + "0" * 64])
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


def test_what_was_fetched_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGETOOL_ORACLES_DIR", str(tmp_path))
    made: list[Path] = []

    def make(target: Path) -> None:
        target.mkdir()
        made.append(target)

    folders = [fetching.fetched("parrots", content, make) for content in ("1.0", "1.0", "1.1")]
    assert len(made) == 2
    assert folders[0] == folders[1] != folders[2]
