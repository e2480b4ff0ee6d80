"""StagedFile and StagedFolder when nothing fails: what may be replaced, who may write, and what is published."""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import shutil
import socket
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergetool.checkpoint import system
from mergetool.checkpoint.files import OutputFile, StagedFile, StagedFolder, write_file
from mergetool.checkpoint.inputs import InputFile
from mergetool.errors import BusyError, DataError, OutputError
from tests.checkpoint.faults import CALLS, Fault, beside, content_of, violations

OLD, NEW = b"old bytes", random.Random(2).randbytes(300_000)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "out.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out"


def stage_folder(target: Path, files: dict[str, bytes], *, overwrite: bool = False) -> StagedFolder:
    staged = StagedFolder.create(target, sum(map(len, files.values())), overwrite=overwrite)
    for name, data in files.items():
        staged.add(name, len(data)).write(0, memoryview(data))
    return staged


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


# ---- publishing a file


def test_nothing_is_at_the_target_before_publish_and_all_after(target: Path) -> None:
    with StagedFile.create(target, len(NEW)) as staged:
        staged.write(0, memoryview(NEW))
        assert not target.exists()
        staged.publish()
        assert target.read_bytes() == NEW
    assert violations(target, None, NEW, succeeded=True) == []


@pytest.mark.parametrize("native", [True, False])
def test_unwritten_bytes_are_zero(target: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    if not native:
        monkeypatch.setattr(system, "NATIVE", {})
    with StagedFile.create(target, 100_000) as staged:
        staged.write(50_000, memoryview(b"middle"))
        staged.publish()
    assert target.read_bytes() == bytes(50_000) + b"middle" + bytes(49_994)


def test_overwrite_replaces_the_old_file(target: Path) -> None:
    target.write_bytes(OLD)
    write_file(target, NEW, overwrite=True)
    assert violations(target, OLD, NEW, succeeded=True) == []


def test_leaving_the_block_without_publish_keeps_the_old_file(target: Path) -> None:
    target.write_bytes(OLD)
    with StagedFile.create(target, len(NEW), overwrite=True) as staged:
        staged.write(0, memoryview(NEW))
    assert target.read_bytes() == OLD
    assert violations(target, OLD, NEW) == []


def test_an_exception_keeps_the_old_file(target: Path) -> None:
    target.write_bytes(OLD)
    with pytest.raises(KeyboardInterrupt), StagedFile.create(target, 5, overwrite=True):
        raise KeyboardInterrupt
    assert target.read_bytes() == OLD
    assert violations(target, OLD, NEW) == []


def test_empty_file(target: Path) -> None:
    write_file(target, b"")
    assert target.read_bytes() == b""


def test_digest_does_not_depend_on_the_order_or_threads_of_writing(target: Path) -> None:
    step = 10_007
    offsets = list(range(0, len(NEW), step))
    random.Random(5).shuffle(offsets)
    with StagedFile.create(target, len(NEW)) as staged:

        def write(mine: list[int]) -> None:
            for offset in mine:
                staged.write(offset, memoryview(NEW)[offset : offset + step])
                staged.flush_behind(offset, len(NEW[offset : offset + step]))

        threads = [threading.Thread(target=write, args=(offsets[part::4],)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        staged.publish()
    assert hashlib.sha256(target.read_bytes()).digest() == hashlib.sha256(NEW).digest()


def test_write_takes_a_view_of_wider_elements(target: Path) -> None:
    with StagedFile.create(target, 10) as staged:
        staged.write(2, memoryview(b"abcdefgh").cast("I"))
        staged.publish()
    assert target.read_bytes() == b"\0\0abcdefgh"


@pytest.mark.parametrize(("offset", "data"), [(-1, b"x"), (9, b"xx"), (11, b"")])
def test_write_outside_the_file_is_a_programming_error(target: Path, offset: int, data: bytes) -> None:
    with StagedFile.create(target, 10) as staged, pytest.raises(ValueError, match="are outside"):
        staged.write(offset, memoryview(data))


def test_nothing_can_be_done_after_publish(target: Path) -> None:
    staged = StagedFile.create(target, 1)
    staged.publish()
    with pytest.raises(ValueError, match="no longer open"):
        staged.write(0, memoryview(b"x"))
    with pytest.raises(ValueError, match="already published"):
        staged.publish()
    staged.discard()
    assert target.read_bytes() == b"\0"


def test_discard_twice(target: Path) -> None:
    staged = StagedFile.create(target, 1)
    staged.discard()
    staged.discard()
    with pytest.raises(ValueError, match="already published or discarded"):
        staged.publish()
    assert violations(target, None, b"\0") == []


def test_late_write_keeps_its_descriptor_when_another_thread_discards(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, go = threading.Event(), threading.Event()
    number: list[int] = []
    write_at = system.write_at

    def slow(fd: int, data: memoryview, offset: int) -> int:
        if len(data) != 5:  # the lock file's text
            return write_at(fd, data, offset)
        number.append(fd)
        entered.set()
        go.wait()
        os.fstat(fd)  # raises if the number was freed, and then perhaps given to another file
        return write_at(fd, data, offset)

    monkeypatch.setattr(system, "write_at", slow)
    staged = StagedFile.create(target, 5)
    failures: list[BaseException] = []

    def write() -> None:
        try:
            staged.write(0, memoryview(b"12345"))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=write)
    thread.start()
    entered.wait()
    staged.discard()
    go.set()
    thread.join()
    assert failures == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number[0])
    assert violations(target, None, None) == []


def test_steps_come_in_the_order_of_the_protocol(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.write_bytes(OLD)
    steps = Fault(monkeypatch, 0, 0)
    check = InputFile.check_unchanged
    monkeypatch.setattr(InputFile, "check_unchanged", lambda file: (steps.calls.append("check"), check(file))[1])
    (target.parent / "in").write_bytes(b"input")
    with InputFile.open(target.parent / "in") as source:
        write_file(target, NEW, overwrite=True, inputs=[source])
    expected = ["open_lock", "cut", "write_at", "free_space", "open_new", "allocate", "copy_owner_and_mode", "write_at"]
    expected += ["fsync", "close", "check", "replace", "fsync_folder", "unlink", "close", "close"]
    assert steps.calls == expected


# ---- permissions


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_new_file_has_the_mode_of_the_umask(target: Path, umask: None, mask: int, mode: int) -> None:
    os.umask(mask)
    write_file(target, NEW)
    assert stat.S_IMODE(target.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o666])
def test_replaced_files_mode_is_kept(target: Path, umask: None, mode: int) -> None:
    target.write_bytes(OLD)
    target.chmod(mode)
    write_file(target, NEW, overwrite=True)
    assert stat.S_IMODE(target.stat().st_mode) == mode


def test_replaced_files_owner_is_kept_where_that_is_allowed(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.write_bytes(OLD)
    owner = target.stat().st_uid
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda fd, uid, gid: given.append((uid, gid)))
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    write_file(target, NEW, overwrite=True)
    assert given == [(owner, target.stat().st_gid)]


def test_owner_that_may_not_be_given_away_is_no_failure(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    target.write_bytes(OLD)
    owner = target.stat().st_uid
    monkeypatch.setattr(os, "fchown", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    write_file(target, NEW, overwrite=True)
    assert target.read_bytes() == NEW


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_new_folder_has_the_mode_of_the_umask(folder: Path, umask: None, mask: int, mode: int) -> None:
    os.umask(mask)
    stage_folder(folder, {"a.json": b"{}"}).publish()
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert stat.S_IMODE((folder / "a.json").stat().st_mode) == mode & 0o666


def test_replaced_folders_mode_is_kept(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o710)
    stage_folder(folder, {"a.json": b"{}"}, overwrite=True).publish()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o710


def test_folder_one_may_not_write_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(closed)  # pytest's own folders above are 0700
    monkeypatch.setattr(Path, "resolve", lambda path, strict=False: path)
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(OutputError, match="permission was denied"):
            write_file(Path("x.safetensors"), NEW)
    finally:
        os.seteuid(os.getuid())
    assert list(closed.iterdir()) == []


# ---- what may be replaced


def refuse(target: Path, message: str, *, overwrite: bool = True, inputs: tuple[InputFile, ...] = ()) -> None:
    """Staging a file at ``target`` fails with ``message`` and leaves no trace."""
    before = sorted(target.parent.iterdir()) if target.parent.is_dir() else None
    with pytest.raises(OutputError, match=message):
        StagedFile.create(target, 1, overwrite=overwrite, inputs=inputs)
    assert before is None or sorted(target.parent.iterdir()) == before


def test_existing_file_without_overwrite(target: Path) -> None:
    target.write_bytes(OLD)
    refuse(target, "already exists; choose another name or use `overwrite`", overwrite=False)
    assert target.read_bytes() == OLD


def test_folder_as_a_files_target(folder: Path) -> None:
    folder.mkdir()
    refuse(folder, "is a folder; name a file in it")


def test_fifo(target: Path) -> None:
    os.mkfifo(target)
    refuse(target, "is a device, FIFO or socket")


def test_device() -> None:
    with pytest.raises(OutputError, match="is a device, FIFO or socket"):
        StagedFile.create(Path("/dev/null"), 1, overwrite=True)


def test_link_to_a_device(target: Path) -> None:
    target.symlink_to("/dev/null")
    refuse(target, "is a device, FIFO or socket")


def test_dangling_link(target: Path) -> None:
    target.symlink_to("nothing")
    refuse(target, "is a link that leads nowhere")


def test_circle_of_links(target: Path) -> None:
    target.symlink_to(target.name)
    refuse(target, "is a link that leads nowhere")


def test_missing_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "missing" / "out.safetensors", "does not exist; make it first")


def test_file_as_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refuse(tmp_path / "file" / "out.safetensors", "is not a folder")


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_path_without_a_name(name: str) -> None:
    with pytest.raises(OutputError, match="does not name an output"):
        StagedFile.create(Path(name), 1, overwrite=True)


def test_name_too_long(tmp_path: Path) -> None:
    refuse(tmp_path / ("x" * 250), "the name is too long")


def test_input_itself(target: Path) -> None:
    target.write_bytes(OLD)
    with InputFile.open(target) as source:
        refuse(target, "is the input .* itself", inputs=(source,))


def test_hard_link_of_an_input(target: Path, tmp_path: Path) -> None:
    target.write_bytes(OLD)
    os.link(target, tmp_path / "other")
    with InputFile.open(target) as source:
        refuse(tmp_path / "other", "is the input .* itself", inputs=(source,))


def test_link_to_an_input(target: Path, tmp_path: Path) -> None:
    target.write_bytes(OLD)
    (tmp_path / "link").symlink_to(target)
    with InputFile.open(target) as source:
        refuse(tmp_path / "link", "is the input .* itself", inputs=(source,))


def test_link_is_kept_and_the_file_it_leads_to_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    real = tmp_path / "far" / "real.safetensors"
    real.write_bytes(OLD)
    link = tmp_path / "link.safetensors"
    link.symlink_to("far/real.safetensors")
    with StagedFile.create(link, len(NEW), overwrite=True) as staged:
        assert staged.target == real
        assert len(beside(real)[0]) == 1
        staged.write(0, memoryview(NEW))
        staged.publish()
    assert link.is_symlink()
    assert real.read_bytes() == NEW


def test_relative_path_is_fixed_when_staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    staged = StagedFile.create(Path("out"), 1)
    monkeypatch.chdir("/")
    staged.publish()
    assert (tmp_path / "out").read_bytes() == b"\0"


def test_file_that_appears_meanwhile_is_not_replaced_without_overwrite(target: Path) -> None:
    staged = StagedFile.create(target, len(NEW))
    target.write_bytes(OLD)
    with pytest.raises(OutputError, match="already exists"):
        staged.publish()
    assert target.read_bytes() == OLD
    assert violations(target, OLD, NEW) == []


@pytest.mark.parametrize("native", [True, False])
def test_file_that_appears_at_the_last_moment_is_not_replaced(
    target: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(system, "NATIVE", {})
    rename_new = system.rename_new
    monkeypatch.setattr(system, "rename_new", lambda *names: (target.write_bytes(OLD), rename_new(*names))[1])
    with pytest.raises(OutputError, match="appeared meanwhile"):
        write_file(target, NEW)
    assert target.read_bytes() == OLD
    assert violations(target, OLD, NEW) == []


def test_input_that_changes_meanwhile_stops_the_publishing(target: Path, tmp_path: Path) -> None:
    target.write_bytes(OLD)
    (tmp_path / "in").write_bytes(b"input")
    with InputFile.open(tmp_path / "in") as source:
        staged = StagedFile.create(target, 1, overwrite=True, inputs=[source])
        os.truncate(tmp_path / "in", 1)
        with pytest.raises(DataError, match="changed while it was read"):
            staged.publish()
    assert target.read_bytes() == OLD
    assert violations(target, OLD, b"\0") == []


def test_too_little_space_is_told_before_anything_is_written(target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    with pytest.raises(OutputError, match=rf"needs {free * 2:,} bytes but only [\d,]+ are free"):
        StagedFile.create(target, free * 2)
    assert list(target.parent.iterdir()) == []


def test_file_system_that_tells_no_sizes_is_tried(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"total": 0, "free": 0}))
    write_file(target, NEW)
    assert target.read_bytes() == NEW


# ---- folders


def test_folder_appears_whole(folder: Path) -> None:
    files = {"a.safetensors": NEW, "config.json": b"{}"}
    staged = stage_folder(folder, files)
    assert not folder.exists()
    staged.publish()
    assert violations(folder, None, files, succeeded=True) == []


def test_folder_is_replaced_whole(folder: Path) -> None:
    old = {"a.safetensors": OLD, "b.safetensors": OLD, "README.md": b"", ".gitattributes": b""}
    folder.mkdir()
    for name, data in old.items():
        (folder / name).write_bytes(data)
    stage_folder(folder, {"a.safetensors": NEW}, overwrite=True).publish()
    assert violations(folder, old, {"a.safetensors": NEW}, succeeded=True) == []


def test_every_file_and_the_folder_are_synced_before_the_rename(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = stage_folder(folder, {"a.json": b"a", "b.json": b"b"})
    steps = Fault(monkeypatch, 0, 0)
    staged.publish()
    expected = ["fsync", "close", "fsync", "close", "fsync_folder", "rename_new", "close", "fsync_folder"]
    assert steps.calls[: len(expected)] == expected


def test_folder_without_publish_leaves_nothing(folder: Path) -> None:
    with stage_folder(folder, {"a.json": b"a"}):
        pass
    assert list(folder.parent.iterdir()) == []


def test_existing_folder_without_overwrite(folder: Path) -> None:
    folder.mkdir()
    with pytest.raises(OutputError, match="already exists"):
        StagedFolder.create(folder, 1)


def test_file_as_a_folders_target(folder: Path) -> None:
    folder.write_bytes(OLD)
    with pytest.raises(OutputError, match="is a file, but the output is a folder"):
        StagedFolder.create(folder, 1, overwrite=True)


@pytest.mark.parametrize("name", ["diary.txt", "model.ckpt", ".hidden", "photo.png"])
def test_folder_with_something_of_the_users_is_refused(folder: Path, name: str) -> None:
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(OLD)
    (folder / name).write_bytes(b"precious")
    with pytest.raises(OutputError, match=f'also holds "{name}"'):
        StagedFolder.create(folder, 1, overwrite=True)
    assert content_of(folder) == {"a.safetensors": OLD, name: b"precious"}


def test_folder_of_folders_is_refused(folder: Path) -> None:
    (folder / "vae.json").mkdir(parents=True)
    with pytest.raises(OutputError, match=r'also holds "vae.json"'):
        StagedFolder.create(folder, 1, overwrite=True)


def test_folder_that_holds_an_input_is_refused(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(OLD)
    with (
        InputFile.open(folder / "a.safetensors") as source,
        pytest.raises(OutputError, match=r'a.safetensors" is the input'),
    ):
        StagedFolder.create(folder, 1, overwrite=True, inputs=[source])


def test_users_file_that_arrives_meanwhile_is_never_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    staged = stage_folder(folder, {"a.json": b"a"}, overwrite=True)
    exchange = system.exchange
    monkeypatch.setattr(
        system, "exchange", lambda *names: ((folder / "diary.txt").write_bytes(b"precious"), exchange(*names))[1]
    )
    staged.publish()
    (left,), _ = beside(folder)
    assert content_of(left) == {"diary.txt": b"precious"}
    monkeypatch.setattr(system, "exchange", exchange)
    stage_folder(folder, {"a.json": b"b"}, overwrite=True).publish()
    assert content_of(left) == {"diary.txt": b"precious"}


@pytest.mark.parametrize("name", ["../a.json", "a/b.json", "a\\b.json", "", ".", "a\0.json", "run.py", "/etc/a.json"])
def test_names_that_no_model_folder_holds_are_programming_errors(folder: Path, name: str) -> None:
    with StagedFolder.create(folder, 1) as staged, pytest.raises(ValueError, match="plain name"):
        staged.add(name, 1)
    assert list(folder.parent.iterdir()) == []


def test_link_to_a_folder_is_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    folder.symlink_to("real")
    stage_folder(folder, {"a.json": b"a"}, overwrite=True).publish()
    assert folder.is_symlink()
    assert content_of(tmp_path / "real") == {"a.json": b"a"}


# ---- two runs on one output


def test_second_run_is_told_who_holds_the_output(target: Path) -> None:
    with StagedFile.create(target, 1):
        with pytest.raises(BusyError, match=f"process {os.getpid()} on {socket.gethostname()} is writing"):
            StagedFile.create(target, 1)
        with pytest.raises(BusyError):
            StagedFolder.create(target, 1)
        assert len(beside(target)[0]) == 1
    assert list(target.parent.iterdir()) == []


def test_lock_that_tells_no_name(target: Path) -> None:
    with (target.parent / f".{target.name}.mergetool.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BusyError, match="another process is writing"):
            StagedFile.create(target, 1)


def test_two_outputs_in_one_folder_do_not_disturb_each_other(target: Path) -> None:
    other = target.with_name("other")
    with StagedFile.create(target, 1) as one, StagedFile.create(other, 1) as two:
        one.publish()
        two.publish()
    assert sorted(target.parent.iterdir()) == [other, target]


def test_lock_unlinked_by_its_last_holder_is_not_trusted(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = target.with_name(f".{target.name}.mergetool.lock")
    try_lock = system.try_lock
    unlinked: list[bool] = []

    def unlink_first(fd: int) -> bool | None:
        if not unlinked:
            unlinked.append(True)
            lock.unlink()
        return try_lock(fd)

    monkeypatch.setattr(system, "try_lock", unlink_first)
    with StagedFile.create(target, 1):
        assert lock.exists()
        with pytest.raises(BusyError):
            StagedFile.create(target, 1)
    assert unlinked
    assert list(target.parent.iterdir()) == []


def test_lock_that_is_a_link_is_refused(target: Path) -> None:
    victim = target.with_name("victim")
    victim.write_bytes(b"precious")
    target.with_name(f".{target.name}.mergetool.lock").symlink_to(victim)
    with pytest.raises(OutputError, match="a link is there"):
        StagedFile.create(target, 1)
    assert victim.read_bytes() == b"precious"


def test_lock_left_by_a_killed_run_is_no_hindrance(target: Path) -> None:
    target.with_name(f".{target.name}.mergetool.lock").write_text("1 elsewhere\n")
    write_file(target, NEW)
    assert violations(target, None, NEW, succeeded=True) == []


def test_temporaries_of_dead_runs_are_removed_and_told(target: Path) -> None:
    dead = target.with_name(f".{target.name}.mergetool-0123456789abcdef")
    dead.write_bytes(b"half")
    dead_folder = target.with_name(f".{target.name}.mergetool-fedcba9876543210")
    dead_folder.mkdir()
    (dead_folder / "a.safetensors").write_bytes(b"half")
    with StagedFile.create(target, 1) as staged:
        assert staged.removed == (dead, dead_folder)
    assert list(target.parent.iterdir()) == []


def test_temporary_of_a_living_run_stays(target: Path) -> None:
    living = OutputFile(target.with_name(f".{target.name}.mergetool-0123456789abcdef"), target, 1)
    with StagedFile.create(target, 1) as staged:
        assert staged.removed == ()
        assert living.path.exists()
    living.abandon()


@pytest.mark.parametrize(
    "name",
    [
        ".other.safetensors.mergetool-0123456789abcdef",
        ".out.safetensors.mergetool-0123456789abcde",
        ".out.safetensors.mergetool-0123456789abcdef.bak",
        ".outXsafetensors.mergetool-0123456789abcdef",
        ".out.safetensors.mergetool-my-own-notes0",
    ],
)
def test_files_of_other_names_stay(target: Path, name: str) -> None:
    target.with_name(name).write_bytes(b"precious")
    write_file(target, NEW)
    assert target.with_name(name).read_bytes() == b"precious"


def test_leftover_that_is_a_link_stays(target: Path) -> None:
    link = target.with_name(f".{target.name}.mergetool-0123456789abcdef")
    link.symlink_to("/etc")
    write_file(target, NEW)
    assert link.is_symlink()


# ---- systems that lack a call


def without_pwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pwrite")


def without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "NATIVE", {})


def without_fcntl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "FCNTL", None)


def without_folder_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECTORY")


def without_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fchown", "fchmod", "geteuid", "getegid"):
        monkeypatch.delattr(os, name)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "try_lock", lambda fd: None)


def with_short_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    write_at = system.write_at
    monkeypatch.setattr(system, "write_at", lambda fd, data, offset: write_at(fd, data[:100], offset))


def without_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    for hide in (without_pwrite, without_native, without_fcntl, without_folder_sync, without_modes):
        hide(monkeypatch)


SYSTEMS = [
    without_pwrite,
    without_native,
    without_fcntl,
    without_folder_sync,
    without_modes,
    without_locks,
    with_short_writes,
    without_anything,
]


@pytest.mark.parametrize("hide", SYSTEMS)
@pytest.mark.parametrize("old", [None, OLD])
def test_file_on_a_lesser_system(
    target: Path, monkeypatch: pytest.MonkeyPatch, hide: object, old: bytes | None
) -> None:
    hide(monkeypatch)  # type: ignore[operator]
    if old is not None:
        target.write_bytes(old)
    with StagedFile.create(target, len(NEW), overwrite=True) as staged:
        threads = [
            threading.Thread(target=staged.write, args=(start, memoryview(NEW)[start : start + 20_000]))
            for start in range(0, len(NEW), 20_000)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        staged.flush_behind(0, len(NEW))
        staged.publish()
    assert violations(target, old, NEW, succeeded=True) == []


@pytest.mark.parametrize("hide", SYSTEMS)
def test_new_folder_on_a_lesser_system(folder: Path, monkeypatch: pytest.MonkeyPatch, hide: object) -> None:
    hide(monkeypatch)  # type: ignore[operator]
    stage_folder(folder, {"a.safetensors": NEW}).publish()
    assert violations(folder, None, {"a.safetensors": NEW}, succeeded=True) == []


@pytest.mark.parametrize("hide", [without_native, without_anything])
def test_replacing_a_folder_is_refused_at_once_where_it_cannot_be_one_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hide: object
) -> None:
    hide(monkeypatch)  # type: ignore[operator]
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(OLD)
    with pytest.raises(OutputError, match="cannot swap two folders in one step"):
        StagedFolder.create(folder, 1, overwrite=True)
    assert violations(folder, {"a.safetensors": OLD}, None) == []


def test_full_sync_is_used_where_fsync_only_reaches_the_drive(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Darwin:
        F_FULLFSYNC = 51
        LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB
        flock = staticmethod(fcntl.flock)

        @staticmethod
        def fcntl(fd: int, command: int) -> None:
            calls.append(command)

    monkeypatch.setattr(system, "FCNTL", Darwin)
    write_file(target, NEW)
    assert calls == [51]


def test_every_call_that_changes_the_disk_can_be_made_to_fail() -> None:
    public = {name for name, value in vars(system).items() if callable(value) and value.__module__ == system.__name__}
    harmless = {
        "names_in",
        "open_input",
        "read_at",
        "status",
        "status_of",
        "read_ahead",
        "bring",
        "advise",
        "network_file_system",
        "try_lock",
        "forget",
        "cached",
        "main_memory",
        "most_open_files",
        "keep_freed_memory",
    }
    assert {name for name in public if not name.startswith("_")} == {*CALLS, *harmless, "explain", "explained"}
