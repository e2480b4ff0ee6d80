"""Whatever call fails while an output is written, the target is the complete old output or the complete new one.

Each scenario is run again and again, the Nth system call failing for N = 1, 2, 3 ..., until a run ends without
having reached N.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mergetool.checkpoint import system
from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.files import StagedFile, StagedFolder
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.errors import MergetoolError, OutputError, StorageError
from tests.checkpoint.faults import Content, Fault, content_of, violations

OLD, NEW = b"old bytes", random.Random(4).randbytes(50_000)
Write = Callable[[Path], None]
NEW_FOLDER = {"a.safetensors": NEW, "b.safetensors": NEW[:99], "config.json": b"{}"}
OLD_FOLDER = {"a.safetensors": OLD, "README.md": OLD}


@pytest.fixture(autouse=True)
def quick_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a power cut a sync cannot be seen, and thousands of them on a busy disk take a minute.

    The calls are still made through `system`, counted and failed.
    """
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def quick_folder() -> Iterator[Path]:
    """In memory where that is possible: thousands of files made and removed wait long on a busy disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def write_file(target: Path) -> None:
    with StagedFile.create(target, len(NEW), overwrite=True) as staged:
        for start in range(0, len(NEW), 10_000):
            staged.write(start, memoryview(NEW)[start : start + 10_000])
            staged.flush_behind(start, 10_000)
        staged.publish()


def write_folder(target: Path) -> None:
    with StagedFolder.create(target, sum(map(len, NEW_FOLDER.values())), overwrite=True) as staged:
        for name, data in NEW_FOLDER.items():
            staged.add(name, len(data)).write(0, memoryview(data))
        staged.publish()


HEADER = Header.plan([("x", F32, (3000,)), ("y", F32, (500,))], {"format": "pt"})


def write_checkpoint(target: Path, shard_size: int | None = None) -> None:
    with CheckpointWriter.stage(target, HEADER, overwrite=True, shard_size=shard_size) as out:
        for name, info in HEADER.tensors.items():
            for start in range(0, info.nbytes, 5000):
                out.write(name, start, memoryview(NEW)[start : min(start + 5000, info.nbytes)])
        out.commit()


def write_shards(target: Path) -> None:
    write_checkpoint(target, shard_size=1)


def written(write: Write) -> Content:
    """What a sound run makes, to compare the others with; `test_writer` proves that it is right."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "out.safetensors" if write is write_checkpoint else Path(folder) / "out")
        (path,) = Path(folder).iterdir()
        return content_of(path)


def put(target: Path, content: Content) -> None:
    """Make ``target`` what it was before the run."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if isinstance(content, dict):
        target.mkdir()
        for name, data in content.items():
            (target / name).write_bytes(data)
    elif content is not None:
        target.write_bytes(content)


SCENARIOS = {
    "new file": (write_file, None, NEW),
    "replaced file": (write_file, OLD, NEW),
    "new folder": (write_folder, None, NEW_FOLDER),
    "replaced folder": (write_folder, OLD_FOLDER, NEW_FOLDER),
    "checkpoint": (write_checkpoint, OLD, written(write_checkpoint)),
    "new shards": (write_shards, None, written(write_shards)),
    "replaced shards": (write_shards, OLD_FOLDER, written(write_shards)),
}


def run_with_fault(target: Path, write: Write, old: Content, new: Content, fault: Fault) -> list[str]:
    """Run once with the fault in place; what it violated."""
    reported: MergetoolError | None = None
    try:
        write(target)
    except MergetoolError as error:
        reported = error
    in_place = reported is None or "is in place, but" in str(reported)
    broken = violations(target, old, new, succeeded=in_place)
    if not in_place and content_of(target) != old:
        broken.append("failure was reported but the target changed")
    if reported is not None and (not isinstance(reported, OutputError | StorageError) or "\n" in str(reported)):
        broken.append(f"not one sentence of a storage error: {reported!r}")
    # Removing is the one thing that cannot be undone by removing; and what a swap put aside
    # stays until the swap is known to be durable. The next run clears both away.
    if fault.fired in ("unlink", "remove_folder", "fsync_folder"):
        broken = [text for text in broken if not text.startswith(("left behind", "the lock file"))]
    return broken


@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["ENOSPC", "EIO"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_call_failing(quick_folder: Path, scenario: str, number: int, forever: bool) -> None:
    write, old, new = SCENARIOS[scenario]
    target = quick_folder / ("out.safetensors" if write is write_checkpoint else "out")
    fired: set[str] = set()
    for nth in range(1, 1000):
        put(target, old)
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, nth, number, forever=forever)
            broken = run_with_fault(target, write, old, new, fault)
            assert broken == [], f"call {nth}, {fault.fired}"
        if fault.fired is None:
            assert content_of(target) == new
            break
        fired.add(fault.fired)
        write(target)
        assert violations(target, old, new, succeeded=True) == [], f"run after call {nth}, {fault.fired}"
    assert {"open_lock", "open_new", "allocate", "write_at", "fsync", "close", "fsync_folder", "unlink"} <= fired
    assert fired & {"replace", "rename_new", "exchange"}
    assert nth > 17


def test_failed_sync_is_never_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = StagedFile.create(tmp_path / "out", 5)
    fault = Fault(monkeypatch, 1, errno.EIO)
    with pytest.raises(StorageError, match="syncing failed"):
        staged.publish()
    assert fault.fired == "fsync"
    assert fault.calls.count("fsync") == 1


def test_file_with_a_failed_write_cannot_be_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    staged = StagedFile.create(target, 5)
    with monkeypatch.context() as patch, contextlib.suppress(StorageError):
        Fault(patch, 1, errno.EIO)
        staged.write(0, memoryview(b"12345"))
    with pytest.raises(StorageError, match="an earlier write failed"):
        staged.publish()
    assert violations(target, None, b"12345") == []


def test_system_that_writes_nothing_is_an_error_not_a_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StagedFile.create(tmp_path / "out", 5) as staged:
        monkeypatch.setattr(system, "write_at", lambda *_: 0)
        with pytest.raises(StorageError, match="wrote no bytes"):
            staged.write(0, memoryview(b"12345"))


@pytest.mark.parametrize(
    ("number", "kind", "cause"),
    [
        (errno.ENOSPC, OutputError, "the disk is full"),
        (errno.EDQUOT, OutputError, "the disk quota is used up"),
        (errno.EFBIG, OutputError, "larger than this file system or process may write"),
        (errno.EROFS, OutputError, "the file system is read-only"),
        (errno.EACCES, OutputError, "permission was denied"),
        (errno.EIO, StorageError, r"Input/output error \(EIO\)"),
        (errno.ENXIO, StorageError, r"No such device or address \(ENXIO\)"),
        (0, StorageError, "no code"),
    ],
)
def test_errors_say_what_where_and_what_next(tmp_path: Path, number: int, kind: type, cause: str) -> None:
    error = system.explain(OSError(number, os.strerror(number)), tmp_path / "out", "writing")
    assert type(error) is kind
    with pytest.raises(kind, match=rf'^"{tmp_path}/out": writing failed .*{cause}.*; .*\.$'):
        raise error


# ---- a disk that is really full

LIMIT = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder where a file of 1 MiB is the most that can be written: a tmpfs, else a limit on file size."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={LIMIT}", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode == 0:
        yield tmp_path
        subprocess.run(["umount", str(tmp_path)], check=True)
    else:
        with limited_file_size():
            yield tmp_path


@contextlib.contextmanager
def limited_file_size() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill(target: Path, size: int) -> None:
    with StagedFile.create(target, size, overwrite=True) as staged:
        for start in range(0, size, 1 << 16):
            staged.write(start, memoryview(bytes(min(1 << 16, size - start))))
        staged.publish()


def _nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


def _unseen_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another program fills the disk after the check."""
    monkeypatch.setattr(system, "free_space", lambda _: None)


def _no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    _unseen_space(monkeypatch)
    monkeypatch.delitem(system.NATIVE, "fallocate")


SIZES = [LIMIT + 1, LIMIT + 100_000, 3 * LIMIT]


@pytest.mark.parametrize("hide", [_nothing, _unseen_space, _no_allocation])
@pytest.mark.parametrize("size", SIZES)
def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, hide: object, size: int) -> None:
    target = small_disk / "out"
    target.write_bytes(OLD)
    hide(monkeypatch)  # type: ignore[operator]
    with pytest.raises(OutputError, match=r"are free|the disk is full|may write"):
        fill(target, size)
    assert violations(target, OLD, None) == []
    fill(target, 500_000)
    assert violations(target, OLD, bytes(500_000), succeeded=True) == []


@pytest.mark.parametrize("size", SIZES)
def test_file_larger_than_the_process_may_write(tmp_path: Path, size: int) -> None:
    target = tmp_path / "out"
    target.write_bytes(OLD)
    with limited_file_size(), pytest.raises(OutputError, match="larger than this file system or process may write"):
        fill(target, size)
    assert violations(target, OLD, None) == []


def test_limit_that_is_met_in_the_middle_of_a_write(tmp_path: Path) -> None:
    target = tmp_path / "out"
    staged = StagedFile.create(target, 2 * LIMIT)
    with limited_file_size(), pytest.raises(OutputError, match="larger than"):
        staged.write(LIMIT - 10, memoryview(bytes(100)))  # the kernel writes 10 bytes, then refuses
    with pytest.raises(StorageError, match="an earlier write failed"):
        staged.publish()
    assert violations(target, None, None) == []


# ---- the harness itself: a protocol that is wrong must be caught


def _publishes_before_syncing(target: Path) -> None:
    staged = StagedFile.create(target, len(NEW), overwrite=True)
    with system.explained(target, "publishing"):
        system.replace(staged._file.path, target)
    staged.write(0, memoryview(NEW))
    staged.publish()


def _finishes_on_error(target: Path) -> None:
    staged = StagedFile.create(target, len(NEW), overwrite=True)
    try:
        for start in range(0, len(NEW), 10_000):
            staged.write(start, memoryview(NEW)[start : start + 10_000])
    finally:
        staged._file._damaged = False
        staged.publish()


def _leaves_its_temporary(target: Path) -> None:
    staged = StagedFile.create(target, len(NEW), overwrite=True)
    staged.write(0, memoryview(NEW))
    staged._abandon = lambda: None  # type: ignore[method-assign]
    staged.publish()


def _ignores_errors(target: Path) -> None:
    with contextlib.suppress(StorageError):
        write_file(target)


@pytest.mark.parametrize(
    "wrong", [_publishes_before_syncing, _finishes_on_error, _leaves_its_temporary, _ignores_errors]
)
def test_wrong_protocol_is_caught(tmp_path: Path, wrong: Write) -> None:
    target = tmp_path / "out"
    caught: list[str] = []
    for nth in range(1, 30):
        put(target, OLD)
        for leftover in tmp_path.glob(".*"):
            leftover.unlink()
        with pytest.MonkeyPatch.context() as patch:
            fault = Fault(patch, nth, errno.EIO)
            caught += run_with_fault(target, wrong, OLD, NEW, fault)
    assert caught
