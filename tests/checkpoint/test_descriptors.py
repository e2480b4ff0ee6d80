"""Few open files for many: inputs and outputs of hundreds of shards where a process may have 60 files open."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from mergetool.checkpoint import system
from mergetool.checkpoint.descriptors import LEAST
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.engine.feeding.read_ahead import ReadAhead
from mergetool.errors import DataError, StorageError


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "most_open_files", lambda: 64)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def files(folder: Path, count: int) -> list[Path]:
    paths = [folder / f"{number}.bin" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number % 256]) * 10_000)
    return paths


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("mapped", [True, False])
def test_hundreds_of_inputs_are_read_with_few_descriptors(tmp_path: Path, mapped: bool) -> None:
    before = descriptors()
    opened = [InputFile.open(path) for path in files(tmp_path, 300)]
    for _ in range(2):
        for number, file in enumerate(opened):
            data = bytes(file.window(9_000, 100)) if mapped else file.read(9_000, 100)
            assert data == bytes([number % 256]) * 100
            assert descriptors() - before <= 2 * 16
    for file in opened:
        file.check_unchanged()
        file.close()
    assert descriptors() == before


@pytest.mark.usefixtures("few")
def test_hints_about_a_file_that_is_gone_or_closed_never_fail(tmp_path: Path) -> None:
    first, *others = [InputFile.open(path) for path in files(tmp_path, 100)]
    first.path.unlink()
    for _ in range(2):  # the file that was closed for others, then the one that was closed for good
        first.will_need(0, 100)
        first.forget(0, 100)
        with ReadAhead([first], room=1 << 20):
            pass
        first.close()
    for file in others:
        file.close()


@pytest.mark.usefixtures("few")
def test_a_window_stays_readable_while_its_file_is_closed_for_others(tmp_path: Path) -> None:
    first, *others = [InputFile.open(path) for path in files(tmp_path, 100)]
    window = first.window(0, 10_000)
    for file in others:
        file.window(0, 10)
    assert bytes(window) == bytes(10_000)
    first.release(0, 10_000)
    for file in (first, *others):
        file.close()


@pytest.mark.usefixtures("few")
def test_another_file_at_the_name_of_an_input_that_was_closed_is_not_read(tmp_path: Path) -> None:
    paths = files(tmp_path, 100)
    first, *others = [InputFile.open(path) for path in paths]
    for file in others:
        file.read(0, 1)
    (tmp_path / "new").write_bytes(b"x" * 10_000)
    os.replace(tmp_path / "new", paths[0])
    with pytest.raises(DataError, match="changed while it was read"):
        first.read(0, 1)
    for file in (first, *others):
        file.close()


@pytest.mark.usefixtures("few")
def test_threads_read_what_is_theirs_while_files_come_and_go(tmp_path: Path) -> None:
    opened = [InputFile.open(path) for path in files(tmp_path, 64)]
    wrong: list[int] = []

    def read(part: int) -> None:
        for turn in range(200):
            number = (turn * 7 + part * 13) % 64
            if opened[number].read(turn, 50) != bytes([number]) * 50:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    for file in opened:
        file.close()


@pytest.mark.usefixtures("few")
def test_hundreds_of_shards_are_written_with_few_descriptors(tmp_path: Path) -> None:
    values = {f"t{number:03d}": numpy.full(5, number, numpy.float32) for number in range(200)}
    header = Header.plan([(name, F32, (5,)) for name in values])
    before = descriptors()
    with CheckpointWriter.stage(tmp_path / "out", header, shard_size=20) as out:
        for half in (slice(0, 2), slice(2, 5)):
            for name, value in values.items():
                out.write(name, half.start * 4, value[half].data)
                assert descriptors() - before <= LEAST + 4
        out.commit()
    written = {
        name: value for path in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(path).items()
    }
    assert written.keys() == values.keys()
    assert all(numpy.array_equal(written[name], value) for name, value in values.items())
    assert descriptors() == before


@pytest.mark.usefixtures("few")
def test_a_sync_that_fails_when_a_shard_is_closed_for_others_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    header = Header.plan([(f"t{number}", F32, (5,)) for number in range(50)])
    with CheckpointWriter.stage(tmp_path / "out", header, shard_size=20) as out:
        with monkeypatch.context() as patch:
            patch.setattr(system, "fsync", failing)
            for number in range(50):
                out.write(f"t{number}", 0, memoryview(bytes(20)))
        with pytest.raises(StorageError, match="an earlier write failed"):
            out.commit()
    assert not (tmp_path / "out").exists()


def test_three_models_of_many_shards_merge_with_256_open_files(tmp_path: Path) -> None:
    values = {f"layers.{number}.weight": numpy.full((4, 4), number, numpy.float32) for number in range(120)}
    for scale, name in enumerate("abc", 1):
        (tmp_path / name).mkdir()
        shards = {key: f"model-{number + 1:05d}-of-00120.safetensors" for number, key in enumerate(values)}
        for key, shard in shards.items():
            save_file({key: scale * values[key]}, tmp_path / name / shard)
        (tmp_path / name / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": None, "weight_map": shards})
        )
    program = Path(sys.executable).with_name("mergetool")
    command = f"ulimit -n 256 && '{program}' merge 'a + 2*(c - b)' --force -o out --shard-size 64 --no-progress"
    ran = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    written = {
        name: value for path in (tmp_path / "out").glob("*.safetensors") for name, value in load_file(path).items()
    }
    assert all(numpy.array_equal(written[name], 3 * value) for name, value in values.items())
