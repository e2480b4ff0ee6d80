"""The operating-system calls behind every file, each with a plain fallback.

Files, folders and inputs call these functions and never ``os`` directly for anything that changes a disk:
a test can make the Nth call fail, and a system that lacks a call (Windows, macOS, an old kernel) is
imitated by hiding it. Functions raise plain OSError; `explain` turns one into a sentence.
"""

from __future__ import annotations

import ctypes
import errno
import importlib
import io
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mergetool.errors import MergetoolError, OutputError, StorageError

MADV_DONTNEED = 4
MADV_POPULATE_READ = 22  # Linux 5.14
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
SYNC_FILE_RANGE_WRITE = 2
AT_FDCWD = -100
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
CACHESTAT = 451  # Linux 6.5; the number is the same on every processor but alpha

# A mapped page of a network file whose server loses it is a SIGBUS: such files are read with preadv instead.
NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS",
    0x65735546: "FUSE",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB2",
    0x0BD00BD0: "Lustre",
    0x01021997: "9p",
    0x00C36400: "Ceph",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
}

# What an errno of a missing or unsupported call looks like: not a failure, only a reason to use the fallback.
UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})

# One call moves at most 2,147,479,552 bytes on Linux, and more than 2 GiB is an error on macOS.
LARGEST_TRANSFER = 1 << 30

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "madvise": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    "fallocate": (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64),
    "sync_file_range": (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint),
    "renameat2": (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint),
    "fstatfs": (ctypes.c_int, ctypes.c_void_p),
    "syscall": (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long),  # as of cachestat
    "mincore": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p),
    "mallopt": (ctypes.c_int, ctypes.c_int),
}


def _load_native() -> dict[str, Callable[..., int]]:
    """The C library's calls that Python does not wrap, or wraps without releasing the GIL; empty off Linux."""
    if sys.platform != "linux" or sys.maxsize < 2**32:
        return {}
    library = ctypes.CDLL(None, use_errno=True)
    calls: dict[str, Callable[..., int]] = {}
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is not None:
            function.argtypes = argument_types
            function.restype = ctypes.c_int
            calls[name] = function
    return calls


def _load(module: str) -> Any:
    """A module of the standard library that some systems lack; None there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


# The capability table: a test removes an entry, or an attribute of os, to become a system without the call.
NATIVE = _load_native()
FCNTL = _load("fcntl")
RESOURCE = _load("resource")

WINDOWS = os.name == "nt"

# Seconds between tries of a rename that Windows refuses: scanners and indexers have a new file open for a moment.
WAITS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)

_BINARY = getattr(os, "O_BINARY", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)

# Where a positioned call is missing, the file position is shared between threads.
_position_lock = threading.Lock()


def _native(name: str, *arguments: object) -> None:
    """Call the C library; OSError when it fails, ENOSYS when it has no such function."""
    function = NATIVE.get(name)
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    while function(*arguments) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


# ---- opening


def most_open_files() -> int:
    """The most files that the process may have open at once.

    It is 512 where the system does not say, as in Windows' C library.
    """
    if RESOURCE is None:
        return 512
    soft: int = RESOURCE.getrlimit(RESOURCE.RLIMIT_NOFILE)[0]
    return soft if 0 <= soft < 1 << 20 else 1 << 20


def open_input(path: Path) -> int:
    """Open exactly this path, read-only: no link is followed, and a FIFO does not block. Returns the descriptor."""
    return os.open(path, os.O_RDONLY | _NOFOLLOW | _CLOEXEC | _NONBLOCK | _BINARY)


def open_new(path: Path) -> int:
    """Open a file that did not exist before for reading and writing.

    Its mode is 0666 less the umask.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NOFOLLOW | _CLOEXEC | _BINARY, 0o666)


def open_stage(path: Path) -> int:
    """A read-write descriptor of a file that an earlier run left."""
    return os.open(path, os.O_RDWR | _NOFOLLOW | _CLOEXEC | _NONBLOCK | _BINARY)


def open_lock(path: Path) -> int:
    """A read-write descriptor of a lock file, made when missing."""
    return os.open(path, os.O_RDWR | os.O_CREAT | _NOFOLLOW | _CLOEXEC | _BINARY, 0o666)


def close(fd: int) -> None:
    os.close(fd)


# ---- reading


def read_at(fd: int, buffer: memoryview, offset: int) -> int:
    """Read up to len(buffer) bytes at ``offset`` into ``buffer``. The count may be short; 0 is end of file."""
    part = buffer[:LARGEST_TRANSFER]
    if hasattr(os, "preadv"):
        return os.preadv(fd, [part], offset)
    with _position_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        with io.FileIO(fd, "rb", closefd=False) as file:
            return file.readinto(part) or 0


def read_ahead(fd: int, offset: int, size: int) -> None:
    """Ask for these bytes to be brought into the page cache; returns at once, and never fails."""
    if hasattr(os, "posix_fadvise"):
        try:
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
        except OSError:
            return


def bring(fd: int, offset: int, size: int) -> bool:
    """Read bytes into the page cache and nowhere else.

    Returns when they are there; False at the end of the file, and where no call does that.

    A transfer to /dev/null copies nothing and reads as far ahead as the kernel does: 8 GB at 2.4 to 2.7 GB/s for 0.2 s of the processor's time,
    against 2.1 GB/s into buffers. ``posix_fadvise`` only asks for the bytes: a pass that used it instead took 17 to 21 s, without it 14.
    """
    if sys.platform != "linux":
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY | _CLOEXEC)
    try:
        while size > 0:
            moved = os.sendfile(nowhere, fd, offset, size)
            if moved == 0:
                return False
            offset, size = offset + moved, size - moved
        return True
    finally:
        os.close(nowhere)


def cached(fd: int, offset: int, size: int) -> float | None:
    """The share of these bytes' pages in the page cache. None where the system does not say.

    By cachestat, of which a GB takes 0.15 ms; before Linux 6.5, and where a sandbox forbids it, by mincore, which takes every page of another user's
    file for cached.
    """
    pages = -(-(offset + size) // mmap.PAGESIZE) - offset // mmap.PAGESIZE
    for count in (_cachestat, _mincore):
        with suppress(OSError, ValueError):  # ValueError: nothing to map
            return count(fd, offset, size) / pages
    return None


def _cachestat(fd: int, offset: int, size: int) -> int:
    where = (ctypes.c_uint64 * 2)(offset, size)
    pages = (ctypes.c_uint64 * 5)()  # cached, dirty, being written back, evicted, evicted lately
    _native("syscall", CACHESTAT, fd, ctypes.addressof(where), ctypes.addressof(pages), 0)
    return pages[0]


def _mincore(fd: int, offset: int, size: int) -> int:
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    size += offset - start
    # Nothing is written to it: ctypes tells the address of writable memory alone.
    with mmap.mmap(fd, size, access=mmap.ACCESS_COPY, offset=start) as mapping:
        told = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(mapping)
        try:
            _native("mincore", ctypes.addressof(first), size, ctypes.addressof(told))
        finally:
            del first  # a mapping that is pointed to cannot be closed
    return bytes(told).count(1)


def forget(fd: int, offset: int, size: int) -> None:
    """Let these bytes go from the page cache; whole pages only, a hint that never fails."""
    if hasattr(os, "posix_fadvise"):
        try:
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
        except OSError:
            return


def main_memory() -> int | None:
    """Bytes of this machine's memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def keep_freed_memory(block: int = 32 << 20, unused: int = 256 << 20) -> None:
    """Let this process keep freed memory for its next use.

    It keeps blocks up to ``block`` bytes and ``unused`` bytes in all.

    glibc gives large blocks back to the kernel at once and gets them again as zeroed pages, one fault a 4 KiB: half of
    the page faults of an extraction, 1.3 s of its 33. Nothing happens where the C library has no ``mallopt``.
    """
    mallopt = NATIVE.get("mallopt")
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, block)
        mallopt(M_TRIM_THRESHOLD, unused)


def advise(address: int, size: int, advice: int) -> None:
    """Do ``madvise`` with the GIL released; ``mmap.madvise`` holds it. OSError ENOSYS where missing."""
    _native("madvise", address, size, advice)


def network_file_system(fd: int) -> str | None:
    """The name of a file's network file system, None for a local or unknown one."""
    status = ctypes.create_string_buffer(512)
    try:
        _native("fstatfs", fd, ctypes.addressof(status))
    except OSError:
        return None
    # f_type is the first machine word of struct statfs on every 64-bit Linux but s390x, where it is an int.
    kind = int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_int)], sys.byteorder)
    return NETWORK_FILE_SYSTEMS.get(kind)


# ---- writing


def allocate(fd: int, size: int) -> None:
    """Reserve ``size`` zero bytes for the file, so that a full disk shows now.

    Calls fallocate itself: glibc's posix_fallocate, where the file system has no such operation (NFS 3,
    ZFS), writes one byte a block instead, three million writes for 12 GB. There, and where the call is
    missing, the length is set and nothing is reserved.
    """
    if size == 0:
        return
    try:
        _native("fallocate", fd, 0, 0, size)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        os.ftruncate(fd, size)


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write up to len(data) bytes at ``offset``; the count may be short. Safe from several threads."""
    part = data[:LARGEST_TRANSFER]
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, part, offset)
    with _position_lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, part)


def start_write_back(fd: int, offset: int, size: int) -> None:
    """Start writing these dirty pages to the disk, without waiting. Nothing happens where the call is missing."""
    try:
        _native("sync_file_range", fd, offset, size, SYNC_FILE_RANGE_WRITE)
    except OSError as error:
        if error.errno not in UNSUPPORTED | {errno.ESPIPE}:
            raise


def fsync(fd: int) -> None:
    """Return once the file is on stable storage. A failure is final: pages may already be lost."""
    full = getattr(FCNTL, "F_FULLFSYNC", None)
    if full is None:
        os.fsync(fd)
        return
    # macOS: fsync reaches the drive's cache only. Network mounts there refuse the full one.
    try:
        FCNTL.fcntl(fd, full)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        os.fsync(fd)


def fsync_folder(path: Path) -> None:
    """Return once the folder's names are on stable storage. Windows has no such call and needs none."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in UNSUPPORTED:  # a file system that cannot sync folders says EINVAL
            raise
    finally:
        os.close(fd)


def copy_owner_and_mode(fd: int, old: os.stat_result) -> None:
    """Copy the permissions of the file to be replaced to a new one.

    Its owner too, where that is allowed.
    """
    if hasattr(os, "fchown") and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
        with suppress(PermissionError):
            os.fchown(fd, old.st_uid, old.st_gid)
    if hasattr(os, "fchmod"):
        os.fchmod(fd, old.st_mode & 0o777)


# ---- names


def status(path: Path) -> os.stat_result | None:
    """The status of a path, links not followed; None for nothing there."""
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def status_of(fd: int) -> os.stat_result:
    """The status of an open file."""
    return os.fstat(fd)


def names_in(folder: Path) -> list[str]:
    """The names in a folder, sorted."""
    return sorted(os.listdir(folder))


def cut(fd: int) -> None:
    """Make an open file empty."""
    os.ftruncate(fd, 0)


def replace(source: Path, target: Path) -> None:
    """Rename a file over any file at ``target``, in one step."""
    _patiently(lambda: os.replace(source, target))


def rename_new(source: Path, target: Path) -> None:
    """Rename a file or folder to a name nobody has; FileExistsError when somebody has it."""
    try:
        _native("renameat2", AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        _patiently(lambda: os.rename(source, target))


def _patiently(rename: Callable[[], None]) -> None:
    """Try a rename for three seconds where other programs that have a file open forbid it."""
    for wait in WAITS if WINDOWS else ():
        try:
            return rename()
        except OSError as error:
            if error.errno != errno.EACCES and getattr(error, "winerror", None) not in IN_USE:
                raise
        time.sleep(wait)
    return rename()


def exchange(one: Path, other: Path) -> None:
    """Swap two names in one step; OSError ENOSYS or EINVAL where the system cannot."""
    _native("renameat2", AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def unlink(path: Path) -> None:
    os.unlink(path)


def make_folder(path: Path) -> None:
    """Make one folder with mode 0777 less the umask; FileExistsError when the name is taken."""
    os.mkdir(path)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    os.rmdir(path)


def try_lock(fd: int) -> bool | None:
    """Try to take the exclusive lock of an open file.

    True taken, False held elsewhere, None where locks do not work.
    """
    if FCNTL is None:
        return None
    try:
        FCNTL.flock(fd, FCNTL.LOCK_EX | FCNTL.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lock_folder(path: Path) -> int | None:
    """Open a folder and take its lock; the caller closes the descriptor. None where folders cannot be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return None
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _CLOEXEC)
    try_lock(fd)
    return fd


def free_space(folder: Path) -> int | None:
    """Bytes that may still be written in ``folder``; None where the file system does not say."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


# ---- errors

IN_USE = frozenset({32, 33, 1224})
"""The errors of Windows for a file that a program has open, has locked, or has mapped. Python's errno of the last is EINVAL."""

LONGEST_WINDOWS_PATH = 259
"""Characters of a path where Windows has long paths switched off, which it has unless somebody switched them on."""

_BESIDE = len("..mergetool-0123456789abcdef.journal")

_SENTENCES: dict[str, tuple[str, str]] = {
    "ENOSPC": ("the disk is full", "free some space or choose another folder"),
    "EDQUOT": ("the disk quota is used up", "free some space or choose another folder"),
    "EFBIG": ("it is larger than this file system or process may write", "choose another folder or write shards"),
    "EROFS": ("the file system is read-only", "choose another folder"),
    "EACCES": ("permission was denied", "check the folder's permissions or choose another"),
    "EPERM": ("permission was denied", "check the folder's permissions or choose another"),
    "ENOENT": ("a file or folder of it is gone", "check that nothing else cleans this folder, then run again"),
    "ENOTDIR": ("a part of the path is not a folder", "check the path"),
    "EISDIR": ("a folder is there", "choose another name"),
    "EEXIST": ("something of that name appeared meanwhile", "choose another name or use `overwrite`"),
    "ENAMETOOLONG": ("the name is too long", "choose a shorter name"),
    "ELOOP": ("a link is there", "remove the link or choose another folder"),
    "EBUSY": ("it is in use", "close what uses it and run again"),
    "EXDEV": ("it lies on another file system than its folder", "choose another name"),
}
_BY_NUMBER = {getattr(errno, name): text for name, text in _SENTENCES.items() if hasattr(errno, name)}


def explain(error: OSError, path: Path, action: str) -> MergetoolError:
    """Turn an OSError at ``path`` into the error to raise.

    It came while ``action`` ("writing", "publishing") an output.

    OutputError when another place or more room would help, StorageError when the storage itself failed.
    """
    number = error.errno or 0
    if WINDOWS and (number == errno.EACCES or getattr(error, "winerror", None) in IN_USE):
        return OutputError(
            f'"{path}": {action} failed because permission was denied, as where a program has the file open; '
            "close what uses it (ComfyUI keeps models open), or check the folder's permissions."
        )
    if WINDOWS and number == errno.ENOENT and len(os.path.abspath(path)) + _BESIDE > LONGEST_WINDOWS_PATH:
        return OutputError(
            f'"{path}": {action} failed because the path is too long: Windows takes {LONGEST_WINDOWS_PATH} characters, of which '
            f"mergetool needs {_BESIDE}; choose a shorter one, or switch on long paths in Windows (LongPathsEnabled)."
        )
    if number in _BY_NUMBER:
        cause, remedy = _BY_NUMBER[number]
        return OutputError(f'"{path}": {action} failed because {cause}; {remedy}.')
    text = error.strerror or str(error)
    code = errno.errorcode.get(number, "no code")
    return StorageError(f'"{path}": {action} failed with {text} ({code}); check the disk and run again.')


@contextmanager
def explained(path: Path, action: str) -> Iterator[None]:
    """Within the block, an OSError is raised as `explain` words it."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, action) from error
