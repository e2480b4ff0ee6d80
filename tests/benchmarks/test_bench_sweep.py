"""The sweep's benchmark: what it runs is a sweep, and its ratio is to the copy of the same bytes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from benchmarks import bench_sweep, ceiling
from benchmarks.ceiling import Strategy


def test_a_round_merges_four_outputs_and_compares_them_with_the_copy_of_as_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copied: list[list[int]] = []
    monkeypatch.setattr(ceiling, "drop_caches", lambda _: "cold")
    monkeypatch.setattr(
        ceiling, "best_strategy", lambda *_: Strategy(2, 1 << 20, direct_read=False, direct_write=False)
    )
    monkeypatch.setattr(ceiling, "copy_to_many", lambda _, __, sizes, ___: copied.append(sizes) or 0.5)
    results = tmp_path / "results.csv"
    bench_sweep.main(["--dir", str(tmp_path), "--size", "tiny", "--runs", "1", "--results", str(results)])
    with results.open() as table:
        copy, ours = csv.DictReader(table)
    model = (tmp_path / "alkahest.safetensors").stat().st_size
    assert len(copied[0]) == 4
    assert all(0.4 * model < size < 0.8 * model for size in copied[0])
    assert int(ours["bytes_written"]) == sum(copied[0])
    assert (copy["provider"], ours["provider"]) == ("byte copy", "mergetool")
    assert float(ours["ratio"]) == pytest.approx(float(ours["value"]) / 0.5, rel=1e-3)
    assert "x the copy" in capsys.readouterr().out
    assert not list(tmp_path.glob("bench-sweep-*"))
