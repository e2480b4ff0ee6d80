"""The byte copy must really move the bytes: a ceiling that skips some would make every merge look slow."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ceiling
from benchmarks.ceiling import STRATEGIES, Strategy, best_strategy, copy, copy_to_many

CACHED = Strategy(threads=3, chunk=1 << 16, direct_read=False, direct_write=False)


@pytest.fixture(autouse=True)
def _caches_of_the_machine_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling, "DROP_CACHES", tmp_path / "not" / "there")


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three files of random bytes, of different lengths, none a whole number of pages."""
    chance = random.Random(5)
    paths = []
    for name, size in (("a", 1_000_001), ("b", 1_300_007), ("c", 700_003)):
        path = tmp_path / name
        path.write_bytes(chance.randbytes(size))
        paths.append(path)
    return paths


@pytest.mark.parametrize("strategy", [replace(one, chunk=1 << 16) for one in STRATEGIES], ids=str)
def test_every_strategy_writes_the_first_input_byte_for_byte(
    strategy: Strategy, inputs: list[Path], tmp_path: Path
) -> None:
    seconds = copy(inputs, tmp_path / "out", strategy)
    assert seconds > 0
    assert (tmp_path / "out").read_bytes() == inputs[0].read_bytes()


def test_every_byte_of_every_input_is_read(inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    real = ceiling._read

    def counted(fd: int, buffer: memoryview, start: int, end: int) -> None:
        read.append((start, end))
        real(fd, buffer, start, end)

    monkeypatch.setattr(ceiling, "_read", counted)
    copy(inputs, tmp_path / "out", CACHED)
    assert sum(end - start for start, end in read) == sum(path.stat().st_size for path in inputs)


@pytest.mark.parametrize("size", [400_000, 3_000_001], ids=["small outputs", "large outputs"])
def test_a_copy_to_many_reads_the_inputs_once_and_writes_every_output_whole(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    moved = {"_read": 0, "_write": 0}

    def counted(name: str) -> None:
        real = getattr(ceiling, name)

        def move(fd: int, buffer: memoryview, start: int, end: int, *how: Strategy) -> None:
            moved[name] += end - start
            real(fd, buffer, start, end, *how)

        monkeypatch.setattr(ceiling, name, move)

    counted("_read")
    counted("_write")
    copy_to_many(inputs, tmp_path / "out", [size] * 3, CACHED)
    whole = sum(path.stat().st_size for path in inputs)
    assert moved["_write"] == 3 * size
    assert whole <= moved["_read"] < whole + 2 * 3 * 4096  # a share begins at a page, which the one before may end in
    assert not (tmp_path / "out").exists()


def test_an_old_longer_output_is_replaced(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(bytes(5_000_000))
    copy(inputs, out, CACHED)
    assert out.read_bytes() == inputs[0].read_bytes()


def test_a_limit_copies_the_front_only(inputs: list[Path], tmp_path: Path) -> None:
    copy(inputs, tmp_path / "out", CACHED, limit=123_457)
    assert (tmp_path / "out").read_bytes() == inputs[0].read_bytes()[:123_457]


def test_wanted_ranges_leave_the_output_whole(inputs: list[Path], tmp_path: Path) -> None:
    copy(inputs, tmp_path / "out", CACHED, wanted=lambda _: [(5_000, 9_000), (400_000, 650_000)])
    assert (tmp_path / "out").read_bytes() == inputs[0].read_bytes()


def test_chunks_start_on_pages_and_cover_the_ranges() -> None:
    assert list(ceiling._chunks([(9000, 20000), (5000, 9000), (100_000, 100_001)], 8192)) == [
        (4096, 12288),
        (12288, 20000),
        (98304, 100_001),
    ]


def test_the_best_strategy_is_one_of_those_tried_and_leaves_nothing(inputs: list[Path], tmp_path: Path) -> None:
    assert best_strategy(inputs, tmp_path / "probe", limit=100_000) in STRATEGIES
    assert not (tmp_path / "probe").exists()


def test_root_drops_every_cache(inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    switch = tmp_path / "drop_caches"
    switch.touch()
    monkeypatch.setattr(ceiling, "DROP_CACHES", switch)
    assert ceiling.drop_caches(inputs) == "cold (drop_caches)"
    assert switch.read_text() == "3\n"


def test_others_drop_the_pages_of_the_files_and_folders_named(inputs: list[Path]) -> None:
    assert ceiling.drop_caches([*inputs, inputs[0].parent]) == "cold (fadvise)"
    assert ceiling.warm_caches(inputs) == "warm"
