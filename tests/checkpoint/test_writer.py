"""CheckpointWriter: what it writes, safetensors reads; what is not complete, it does not publish."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import random
import threading
from pathlib import Path

import numpy
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from mergetool.checkpoint import progress, system
from mergetool.checkpoint.dtypes import BF16, BY_CODE, F16, F32
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.outputs import Target
from mergetool.checkpoint.shards import ShardIndex
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.errors import BusyError, OutputError, StorageError, UsageError
from tests.checkpoint.faults import Fault, beside, content_of, violations

ENTRIES = [
    ("b.weight", F16, (300, 70)),
    ("a.weight", F32, (1000, 33)),
    ("scalar", F32, ()),
    ("nothing", F16, (0, 5)),
    ("bytes", BY_CODE["U8"], (12_345,)),
]
HEADER = Header.plan(ENTRIES, {"format": "pt", "made": "for a test"})
DRAW = random.Random(6)
DATA = {name: DRAW.randbytes(info.nbytes) for name, info in HEADER.tensors.items()}
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


def write_all(out: CheckpointWriter, step: int = 10_000) -> None:
    for name, data in DATA.items():
        for start in range(0, len(data), step):
            out.write(name, start, memoryview(data)[start : start + step])


def save(target: Path | Target, **options: object) -> None:
    with CheckpointWriter.stage(target, HEADER, **options) as out:  # type: ignore[arg-type]
        write_all(out)
        out.commit()


def loaded(*files: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for file in files for name, array in load_file(file).items()}


# ---- what is written


def test_one_file_reads_back(target: Path) -> None:
    save(target)
    assert loaded(target) == DATA
    with safe_open(target, "numpy") as file:
        assert file.metadata() == {"format": "pt", "made": "for a test"}
        assert {name: file.get_slice(name).get_dtype() for name in file.keys()} == {  # noqa: SIM118
            name: dtype.code for name, dtype, _ in ENTRIES
        }
    assert violations(target, None, target.read_bytes(), succeeded=True) == []


def test_file_is_header_then_data(target: Path) -> None:
    save(target)
    assert target.read_bytes() == HEADER.encode() + b"".join(DATA[name] for name in HEADER.tensors)


def test_views_of_wider_elements_are_bytes(target: Path) -> None:
    with CheckpointWriter.stage(target, Header.plan([("x", F32, (2, 2))])) as out:
        out.write("x", 0, numpy.arange(4, dtype=numpy.float32).reshape(2, 2).data)
        out.commit()
    assert load_file(target)["x"].tolist() == [[0, 1], [2, 3]]


def test_shards_read_back(tmp_path: Path) -> None:
    save(tmp_path / "out", shard_size=60_000, extra_files={"config.json": b"{}"})
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [path.name for path in shards] == [
        f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)
    ]
    assert len(shards) == 2
    assert loaded(*shards) == DATA
    index = json.loads((tmp_path / "out" / INDEX).read_bytes())
    assert index["weight_map"] == {name: path.name for path in shards for name in load_file(path)}
    assert index["metadata"]["total_size"] == sum(map(len, DATA.values()))
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"


def test_index_and_shards_agree(tmp_path: Path) -> None:
    save(tmp_path / "out", shard_size=1)
    index = ShardIndex.parse((tmp_path / "out" / INDEX).read_bytes(), source="index")
    headers = {}
    for name in index.shards:
        raw = (tmp_path / "out" / name).read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        headers[name] = Header.parse(raw[:start], file_size=len(raw), source=name)
    index.require_agreement(headers)
    assert index.weight_map.keys() == DATA.keys()


@pytest.mark.parametrize("shard_size", [None, 10**9])
def test_folder_of_one_file_needs_no_index(tmp_path: Path, shard_size: int | None) -> None:
    save(Target(tmp_path / "out", "folder"), shard_size=shard_size, extra_files={"config.json": b"{}"})
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert loaded(tmp_path / "out" / "diffusion_pytorch_model.safetensors") == DATA


def test_single_file_leaves_extra_files_out(target: Path) -> None:
    save(target, extra_files={"config.json": b"{}"})
    assert list(target.parent.iterdir()) == [target]


def test_checkpoint_without_tensors(target: Path) -> None:
    with CheckpointWriter.stage(target, Header.plan([])) as out:
        out.commit()
    assert load_file(target) == {}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("step", [997, 65_536])
@pytest.mark.parametrize("shard_size", [None, 60_000])
def test_bytes_do_not_depend_on_order_or_threads(
    tmp_path: Path, threads: int, step: int, shard_size: int | None
) -> None:
    save(Target(tmp_path / "plain", "folder"), shard_size=shard_size)
    pieces = [(name, start) for name, data in DATA.items() for start in range(0, len(data), step)]
    random.Random(threads * step).shuffle(pieces)
    with CheckpointWriter.stage(Target(tmp_path / "out", "folder"), HEADER, shard_size=shard_size) as out:

        def work(mine: list[tuple[str, int]]) -> None:
            for name, start in mine:
                out.write(name, start, memoryview(DATA[name])[start : start + step])

        pool = [threading.Thread(target=work, args=(pieces[part::threads],)) for part in range(threads)]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        out.commit()
    digests = [
        {name: hashlib.sha256(data).hexdigest() for name, data in content_of(tmp_path / folder).items()}  # type: ignore[union-attr]
        for folder in ("plain", "out")
    ]
    assert digests[0] == digests[1]


# ---- the header comes last


@pytest.mark.parametrize("shard_size", [None, 60_000])
def test_no_staged_file_can_be_loaded_before_commit(tmp_path: Path, shard_size: int | None) -> None:
    with CheckpointWriter.stage(Target(tmp_path / "out", "folder"), HEADER, shard_size=shard_size) as out:
        write_all(out)
        (staged,), _ = beside(tmp_path / "out")
        files = sorted(staged.glob("*.safetensors"))
        assert len(files) == (1 if shard_size is None else 2)
        assert all(file.read_bytes()[:8] == bytes(8) for file in files)


def test_header_is_the_last_write_before_the_sync(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int | str] = []
    write_at, fsync = system.write_at, system.fsync
    monkeypatch.setattr(system, "write_at", lambda fd, data, at: (steps.append(at), write_at(fd, data, at))[1])
    monkeypatch.setattr(system, "fsync", lambda fd: (steps.append("fsync"), fsync(fd))[1])
    save(target)
    assert steps[-2:] == [0, "fsync"]
    assert all(isinstance(at, int) and at >= HEADER.data_start for at in steps[1:-2])  # the first is the lock's text


def test_header_that_does_not_fit_before_its_data_is_refused(target: Path) -> None:
    raw = HEADER.encode()
    loose = (len(raw) - 8 + 7).to_bytes(8, "little") + raw[8:] + b" " * 7
    header = Header.parse(loose, file_size=len(loose) + HEADER.data_size, source="loose")
    with pytest.raises(ValueError, match="plan it"):
        CheckpointWriter.stage(target, header)
    assert list(target.parent.iterdir()) == []


# ---- nothing incomplete is published


def commit_fails(target: Path, message: str, pieces: list[tuple[str, int, int]]) -> None:
    """Committing after these (name, start, stop) fails with ``message``, and nothing is left."""
    out = CheckpointWriter.stage(target, HEADER)
    for name, start, stop in pieces:
        out.write(name, start, memoryview(DATA[name])[start:stop])
    with pytest.raises(RuntimeError, match=message):
        out.commit()
    assert violations(target, None, None) == []


def whole(*without: str) -> list[tuple[str, int, int]]:
    return [(name, 0, len(data)) for name, data in DATA.items() if name not in without]


def test_tensor_never_written(target: Path) -> None:
    commit_fails(target, r'"b.weight" was written up to byte 0 of 42000', whole("b.weight"))


def test_last_byte_missing(target: Path) -> None:
    commit_fails(target, r'"bytes" was written up to byte 12344 of 12345', [*whole("bytes"), ("bytes", 0, 12_344)])


def test_first_byte_missing(target: Path) -> None:
    commit_fails(target, r'"bytes" was written up to byte 0 of', [*whole("bytes"), ("bytes", 1, 12_345)])


def test_byte_missing_in_the_middle(target: Path) -> None:
    pieces = [("bytes", 0, 100), ("bytes", 101, 12_345)]
    commit_fails(target, r'"bytes" was written up to byte 100 of', [*whole("bytes"), *pieces])


def test_byte_written_twice(target: Path) -> None:
    commit_fails(target, r'"bytes" had byte 50 written twice', [*whole(), ("bytes", 50, 51)])


def test_hole_hidden_by_an_equally_large_overlap(target: Path) -> None:
    pieces = [("bytes", 0, 100), ("bytes", 90, 190), ("bytes", 200, 12_345)]
    commit_fails(target, r'"bytes" had byte 90 written twice', [*whole("bytes"), *pieces])


def test_failed_write_forbids_commit(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.write_bytes(b"old")
    out = CheckpointWriter.stage(target, HEADER, overwrite=True)
    write_all(out)
    with monkeypatch.context() as patch:
        Fault(patch, 1, errno.EIO)
        with pytest.raises(StorageError, match="writing failed"):
            out.write("bytes", 0, memoryview(DATA["bytes"]))
    with pytest.raises(StorageError, match="an earlier write failed"):
        out.commit()
    assert violations(target, b"old", None) == []


def test_leaving_the_block_publishes_nothing(target: Path) -> None:
    with CheckpointWriter.stage(target, HEADER) as out:
        write_all(out)
    assert list(target.parent.iterdir()) == []


def test_an_exception_publishes_nothing(target: Path) -> None:
    def interrupted() -> None:
        with CheckpointWriter.stage(target, HEADER) as out:
            write_all(out)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(target.parent.iterdir()) == []


def test_commit_twice(target: Path) -> None:
    with CheckpointWriter.stage(target, HEADER) as out:
        write_all(out)
        out.commit()
        before = target.read_bytes()
        with pytest.raises(ValueError, match="already published"):
            out.commit()
    assert target.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "start", "size", "message"),
    [
        ("unknown", 0, 1, 'tensor "unknown" is not in the planned header'),
        ("scalar", -1, 1, 'tensor "scalar" has 4 bytes'),
        ("scalar", 1, 4, 'tensor "scalar" has 4 bytes; bytes 1 to 5 are outside'),
        ("nothing", 0, 1, 'tensor "nothing" has 0 bytes'),
    ],
)
def test_write_outside_a_tensor_is_a_programming_error(
    target: Path, name: str, start: int, size: int, message: str
) -> None:
    with CheckpointWriter.stage(target, HEADER) as out, pytest.raises(ValueError, match=message):
        out.write(name, start, memoryview(bytes(size)))


# ---- what may be staged


def test_shards_in_a_single_file_are_refused(target: Path) -> None:
    with pytest.raises(UsageError, match="names one file, but shards need a folder"):
        CheckpointWriter.stage(target, HEADER, shard_size=100)


def test_existing_target_without_overwrite(target: Path) -> None:
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="already exists"):
        CheckpointWriter.stage(target, HEADER)


def test_input_as_output(target: Path) -> None:
    save(target)
    with InputFile.open(target) as source, pytest.raises(OutputError, match="is the input"):
        CheckpointWriter.stage(target, HEADER, overwrite=True, inputs=[source])


def test_second_writer_on_the_same_output(target: Path) -> None:
    with CheckpointWriter.stage(target, HEADER), pytest.raises(BusyError):
        CheckpointWriter.stage(target, HEADER)


def test_target_and_removed_are_told(target: Path) -> None:
    dead = target.with_name(f".{target.name}.mergetool-0123456789abcdef")
    dead.touch()
    with CheckpointWriter.stage(target, HEADER) as out:
        assert (out.target, out.removed) == (target, (dead,))


@pytest.mark.parametrize("name", ["../config.json", "run.py", "diffusion_pytorch_model.safetensors"])
def test_extra_files_that_do_not_belong_leave_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, OutputError)):
        CheckpointWriter.stage(Target(tmp_path / "out", "folder"), HEADER, extra_files={name: b"{}"})
    assert list(tmp_path.iterdir()) == []


def test_replaced_folder_holds_only_the_new_files(tmp_path: Path) -> None:
    save(tmp_path / "out", shard_size=1, extra_files={"config.json": b"old"})
    save(Target(tmp_path / "out", "folder"), overwrite=True, extra_files={"config.json": b"new"})
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


# ---- write-back


def test_blocks_go_to_the_disk_once_and_only_when_full(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FLUSH_BLOCK", 4096)
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(system, "start_write_back", lambda fd, offset, size: started.append((offset, size)))
    header = Header.plan([("x", BF16, (50_000,))])
    pieces = [(start, min(1000, 100_000 - start)) for start in range(0, 100_000, 1000)]
    random.Random(7).shuffle(pieces)
    with CheckpointWriter.stage(target, header) as out:
        for start, size in pieces:
            out.write("x", start, memoryview(bytes(size)))
        out.commit()
    # the first block waits for the header, and the last is never full
    last = math.floor(header.file_size / 4096)
    assert sorted(started) == [(block * 4096, 4096) for block in range(1, last)]
