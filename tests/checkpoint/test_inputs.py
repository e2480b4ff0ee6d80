"""InputFile: what may be opened, that every way of reading gives the file's bytes, and that changes are noticed."""

from __future__ import annotations

import errno
import mmap
import os
import random
import socket
import threading
from pathlib import Path

import pytest

from mergetool.checkpoint import inputs, system
from mergetool.checkpoint.inputs import InputFile, leads_out
from mergetool.errors import DataError, InputMissing, StorageError

PAGE = mmap.PAGESIZE


@pytest.fixture
def content() -> bytes:
    return random.Random(1).randbytes(5 * PAGE + 123)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


RANGES = [(0, 1), (0, PAGE), (PAGE - 1, 2), (3, 4 * PAGE), (5 * PAGE, 123), (0, 5 * PAGE + 123), (7, 0)]


# ---- opening


def test_open_tells_size_and_identity(path: Path, content: bytes) -> None:
    status = path.stat()
    with InputFile.open(path) as file:
        assert file.size == len(content)
        assert file.identity == (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r'nothing.safetensors" does not exist'):
        InputFile.open(tmp_path / "nothing.safetensors")


def test_missing_folder_on_the_way(path: Path) -> None:
    with pytest.raises(InputMissing, match="does not exist"):
        InputFile.open(path / "model.safetensors")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        InputFile.open(tmp_path)


def test_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="is a FIFO"):
        InputFile.open(tmp_path / "pipe")


def test_fifo_that_appears_after_the_first_look_is_refused_too(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    open_input = system.open_input
    monkeypatch.setattr(system, "open_input", lambda _: open_input(tmp_path / "pipe"))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(DataError, match="is a FIFO"):
        InputFile.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes only
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(DataError, match="is a socket"):
            InputFile.open(Path("socket"))


def test_device_is_refused() -> None:
    with pytest.raises(DataError, match="is a device"):
        InputFile.open(Path("/dev/zero"))


def test_permission_denied(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.chmod(0)
    path.parent.chmod(0o755)
    monkeypatch.chdir(path.parent)  # pytest's own folders above are 0700
    if os.geteuid() == 0:
        os.seteuid(65534)  # root may read anything
    try:
        with pytest.raises(InputMissing, match="permission denied"):
            InputFile.open(Path(path.name))
    finally:
        os.seteuid(os.getuid())


# ---- links


def test_link_into_the_same_folder_is_followed(path: Path, content: bytes) -> None:
    link = path.with_name("link.safetensors")
    link.symlink_to(path.name)
    with InputFile.open(link) as file:
        assert file.read(0, file.size) == content
        assert file.path == link


@pytest.mark.parametrize("inner", ["", "transformer/"])
def test_link_into_the_blobs_of_its_own_repository_is_followed(tmp_path: Path, inner: str) -> None:
    repository = tmp_path / "models--a--b"
    link = repository / "snapshots" / "0123" / inner / "model.safetensors"
    blob = repository / "blobs" / "digest"
    for folder in (link.parent, blob.parent):
        folder.mkdir(parents=True)
    blob.write_bytes(b"blob")
    link.symlink_to(os.path.relpath(blob, link.parent))
    with InputFile.open(link) as file:
        assert file.read(0, 4) == b"blob"


@pytest.mark.parametrize(
    "place", ["models--c--d/blobs", "models--a--b/other", "models--a--b", ".", "models--a--b/blobs"]
)
def test_a_link_is_followed_anywhere_and_told_from_one_to_the_caches_own_blobs(tmp_path: Path, place: str) -> None:
    link = tmp_path / "models--a--b" / "snapshots" / "0123" / "model.safetensors"
    link.parent.mkdir(parents=True)
    far = tmp_path / place / "far"
    far.parent.mkdir(parents=True, exist_ok=True)
    far.write_bytes(b"far")
    link.symlink_to(far)
    with InputFile.open(link) as file:
        assert (file.read(0, 3), file.path) == (b"far", link)
    assert leads_out(link) == (place != "models--a--b/blobs")
    assert not leads_out(far)


def test_a_blob_that_is_a_link_leads_out(tmp_path: Path) -> None:
    link = tmp_path / "repository" / "snapshots" / "0123" / "config.json"
    blob = tmp_path / "repository" / "blobs" / "digest"
    for folder in (link.parent, blob.parent):
        folder.mkdir(parents=True)
    (tmp_path / "secret").write_bytes(b"secret")
    blob.symlink_to(tmp_path / "secret")
    link.symlink_to(blob)
    assert leads_out(link)


@pytest.mark.parametrize("leads_to", ["nothing", "itself"])
def test_link_to_nothing(tmp_path: Path, leads_to: str) -> None:
    (tmp_path / "itself").symlink_to(leads_to)
    with pytest.raises(InputMissing, match="leads to no file"):
        InputFile.open(tmp_path / "itself")


def test_link_to_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with pytest.raises(DataError, match="is a folder"):
        InputFile.open(tmp_path / "link")


def test_file_that_becomes_a_link_is_not_followed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_input = system.open_input

    def swap_first(name: Path) -> int:
        path.unlink()
        path.symlink_to("/etc/passwd")
        return open_input(name)

    monkeypatch.setattr(system, "open_input", swap_first)
    with pytest.raises(DataError, match="became a link"):
        InputFile.open(path)


# ---- reading


def _short_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    read_at = system.read_at
    monkeypatch.setattr(system, "read_at", lambda fd, buffer, offset: read_at(fd, buffer[:100], offset))


def _without_preadv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "posix_fadvise")


def _without_populate(monkeypatch: pytest.MonkeyPatch) -> None:
    def advise(address: int, size: int, advice: int) -> None:
        raise OSError(errno.EINVAL, "an old kernel")

    monkeypatch.setattr(system, "advise", advise)


def _without_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "NATIVE", {})


def _without_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENODEV, "no mapping here")

    monkeypatch.setattr(inputs.mmap, "mmap", refuse)


def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    pass


SYSTEMS = [_plain, _short_reads, _without_preadv, _without_populate, _without_native, _without_mapping]


@pytest.mark.parametrize("make_system", SYSTEMS)
@pytest.mark.parametrize(("offset", "size"), RANGES)
def test_every_way_of_reading_gives_the_bytes(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, make_system: object, offset: int, size: int
) -> None:
    make_system(monkeypatch)  # type: ignore[operator]
    expected = content[offset : offset + size]
    with InputFile.open(path) as file:
        file.will_need(offset, size)
        buffer = bytearray(size)
        file.read_into(memoryview(buffer), offset)
        window = file.window(offset, size)
        assert buffer == expected
        assert file.read(offset, size) == expected
        assert window == expected
        assert window.readonly or make_system is not _plain
        file.release(offset, size)
        assert window == expected


def test_read_into_takes_a_view_of_wider_elements(path: Path, content: bytes) -> None:
    buffer = memoryview(bytearray(64)).cast("I")
    with InputFile.open(path) as file:
        file.read_into(buffer, 5)
    assert bytes(buffer) == content[5:69]


@pytest.mark.parametrize("make_system", [_plain, _without_preadv, _without_mapping])
def test_threads_reading_at_once_do_not_disturb_each_other(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, make_system: object
) -> None:
    make_system(monkeypatch)  # type: ignore[operator]
    wrong: list[int] = []
    with InputFile.open(path) as file:

        def read(seed: int) -> None:
            draw = random.Random(seed)
            for _ in range(300):
                offset = draw.randrange(len(content) - 50)
                window = file.window(offset, 50)
                if file.read(offset, 50) != content[offset : offset + 50] or window != content[offset : offset + 50]:
                    wrong.append(offset)
                file.release(offset, 50)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize(("offset", "size"), [(-1, 1), (0, -1), (0, 10**6), (5 * PAGE + 123, 1)])
def test_range_outside_the_file_is_a_programming_error(path: Path, offset: int, size: int) -> None:
    with InputFile.open(path) as file:
        for read in (file.read, file.window, file.release):
            if read == file.release:
                assert file.can_map
            with pytest.raises(ValueError, match="are not in it"):
                read(offset, size)


def test_empty_file_cannot_be_mapped_but_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with InputFile.open(tmp_path / "empty") as file:
        assert not file.can_map
        assert file.window(0, 0) == b""
        assert file.read(0, 0) == b""


def test_window_is_one_shared_mapping_not_a_copy(path: Path) -> None:
    with InputFile.open(path) as file:
        window = file.window(10, 4)
        with path.open("r+b") as writer:
            writer.seek(10)
            writer.write(b"live")
        assert window == b"live"


def test_window_is_populated_in_one_call_on_whole_pages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    advise = system.advise
    monkeypatch.setattr(system, "advise", lambda *arguments: (calls.append(arguments), advise(*arguments))[1])
    with InputFile.open(path) as file:
        file.window(PAGE + 1, 2 * PAGE)
        file.release(PAGE + 1, 2 * PAGE)
    assert [(size, advice) for _, size, advice in calls] == [(2 * PAGE + 1, 22), (2 * PAGE + 1, 4)]
    assert all(address % PAGE == 0 for address, _, _ in calls)


def _resident_file_pages() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("this kernel does not tell RssFile")


def test_dropped_windows_do_not_grow_the_process(tmp_path: Path) -> None:
    size, step = 32 << 20, (1 << 20) - 1000  # windows that share their border pages
    path = tmp_path / "large"
    path.write_bytes(random.Random(3).randbytes(1 << 20) * 32)
    with InputFile.open(path) as file:
        file.window(0, 1)
        before = _resident_file_pages()
        kept = file.window(0, size)
        grown = _resident_file_pages() - before
        del kept
        file.release(0, size)
        for offset in range(0, size - step, step):
            file.window(offset, step)
            file.release(offset, step)
        left = _resident_file_pages() - before
    assert grown > size // 2  # the measure works
    assert left < 1 << 20


def test_window_outlives_close(path: Path, content: bytes) -> None:
    file = InputFile.open(path)
    window = file.window(0, len(content))
    file.close()
    file.close()
    assert window == content


@pytest.mark.parametrize("magic", sorted(system.NETWORK_FILE_SYSTEMS))
def test_network_file_systems_are_not_mapped(
    path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, magic: int
) -> None:
    import ctypes

    def fstatfs(fd: int, address: int) -> int:
        ctypes.c_uint.from_address(address).value = magic
        return 0

    monkeypatch.setitem(system.NATIVE, "fstatfs", fstatfs)
    with InputFile.open(path) as file:
        assert not file.can_map
        assert file.window(1, 9) == content[1:10]


def test_local_file_system_is_mapped(path: Path) -> None:
    with InputFile.open(path) as file:
        assert file.can_map


# ---- files that change or fail


def test_unchanged_file_passes(path: Path) -> None:
    with InputFile.open(path) as file:
        file.read(0, 10)
        file.window(0, 10)
        file.check_unchanged()


def _edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"edited")


def _replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def _touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def _truncate(path: Path) -> None:
    os.truncate(path, 10)


@pytest.mark.parametrize("change", [_edit, _replace, _touch, _truncate])
def test_changed_file_is_noticed(path: Path, change: object) -> None:
    os.utime(path, ns=(1, 1))
    with InputFile.open(path) as file:
        change(path)  # type: ignore[operator]
        with pytest.raises(DataError, match="changed while it was read"):
            file.check_unchanged()


def test_removed_file_is_noticed(path: Path) -> None:
    with InputFile.open(path) as file:
        path.unlink()
        with pytest.raises(DataError, match="was removed while it was read"):
            file.check_unchanged()


def test_file_renamed_over_is_not_read(path: Path, content: bytes) -> None:
    with InputFile.open(path) as file:
        path.with_name("other").write_bytes(b"other" * 9999)
        path.with_name("other").replace(path)
        assert file.read(0, file.size) == content


@pytest.mark.parametrize("make_system", [_plain, _short_reads, _without_preadv])
def test_shrunk_file_is_an_error_not_short_data(
    path: Path, monkeypatch: pytest.MonkeyPatch, make_system: object
) -> None:
    make_system(monkeypatch)  # type: ignore[operator]
    with InputFile.open(path) as file:
        _truncate(path)
        with pytest.raises(DataError, match=r"shrank while it was read, from \d+ bytes to 10;"):
            file.read(0, 200)


def test_shrunk_file_is_an_error_not_a_bus_error_when_a_window_is_taken(path: Path) -> None:
    with InputFile.open(path) as file:
        file.window(0, 10)
        _truncate(path)
        with pytest.raises(DataError, match="shrank"):
            file.window(3 * PAGE, PAGE)


@pytest.mark.parametrize("call", ["read_at", "advise"])
def test_disk_error_is_a_storage_error(path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(system, call, fail)
    with InputFile.open(path) as file, pytest.raises(StorageError, match="could not be read"):
        file.read(0, 10) if call == "read_at" else file.window(0, 10)
