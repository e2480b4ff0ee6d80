"""Read input files: one pinned descriptor each, positioned reads, and read-only windows. Windows lie on a mapping."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from mergetool.checkpoint import page_cache, system
from mergetool.checkpoint.descriptors import Pool, Pooled
from mergetool.errors import DataError, InputMissing, MergetoolError, StorageError

Identity = tuple[int, int, int, int, int]  # device, inode, size, mtime_ns, ctime_ns

UNREADABLE = (OSError, ValueError, MergetoolError)
"""Errors of a hint about a file: a disk that fails, a file that was closed, and one that is missing or another when it is opened again."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def identity_of(status: os.stat_result) -> Identity:
    """The part of a file's status that stays while the file is unchanged."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _status_of(fd: int, real_path: Path) -> os.stat_result:
    """The status of an open file, to be compared later with that of its name.

    On Windows by its name too, which nobody can give another file while it is open: there, on FAT and in some versions of Python, the times and
    numbers of a file differ by how it was asked for.
    """
    return os.stat(real_path) if system.WINDOWS else os.fstat(fd)


def leads_out(path: Path) -> bool:
    """Whether ``path`` is a link out of its folder.

    A link to the blobs of its own Hugging Face repository is none.

    Links to blobs are how Hugging Face's cache is laid out (``snapshots/REVISION/... -> blobs/DIGEST``). Raises InputMissing for a link to
    nothing.
    """
    if not path.is_symlink():
        return False
    folder = path.parent.resolve()
    allowed = {folder, *(above.parent / "blobs" for above in (folder, *folder.parents) if above.name == "snapshots")}
    return _target_of(path).parent not in allowed


def _target_of(path: Path) -> Path:
    """The target of the link ``path``, wherever it is; raises InputMissing for a link to nothing."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a circle of links, before Python 3.13
        raise InputMissing(f'"{path}" is a link that leads to no file; check where it points.') from None


def _require_regular(status: os.stat_result, path: Path) -> None:
    for is_kind, name in _KINDS:
        if is_kind(status.st_mode):
            raise DataError(f'"{path}" is {name}; name a regular file instead.')


class Readable(Protocol):
    """Bytes at offsets: those of an `InputFile`, or of a file that is computed when it is read. Every method may be called from several threads."""

    @property
    def size(self) -> int:
        """Bytes in all."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``; raises ValueError past the end."""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``."""

    def window(self, offset: int, size: int) -> memoryview:
        """A view of ``size`` bytes at ``offset``, to be given back with `release`."""

    def release(self, offset: int, size: int) -> None:
        """Tell that these bytes, in a window or a buffer, are no longer needed."""

    def will_need(self, offset: int, size: int) -> None:
        """A hint that these bytes will be read."""

    def forget(self, offset: int, size: int) -> None:
        """A hint that these bytes will not be read again."""


# Windows or positioned reads, GB/s of summed bytes, 2 GiB in the page cache, 2 cores, median of 5: with 4 MiB
# pieces 26 (window) and 23 (read_into a reused buffer) on one thread, 35 and 30 on two; with 1 MiB pieces 23 and 21
# on one, but 24 and 29 on two: mapping and unmapping small windows makes the threads wait for each other.
class InputFile(Pooled):
    """One input file, pinned when it is opened: a file renamed over it later is not read.

    Where too many are open it is closed for a while, and what is opened again must still be the same file, unchanged.

    ``size`` is in bytes and ``identity`` is (device, inode, size, mtime_ns, ctime_ns), both as of the
    opening. Every method may be called from several threads at once.
    """

    def __init__(self, path: Path, real_path: Path, fd: int, status: os.stat_result) -> None:
        self.path = path
        self.size = status.st_size
        self.identity = identity_of(status)
        self._real_path = real_path
        self._fd = fd
        self._lock = threading.Lock()
        self._tried_to_map = False
        self._mapping: _Mapping | None = None
        self._closed = False
        self._cached_before: page_cache.CachedBefore | None = page_cache.cached_before(fd, self.size, self.identity)
        self._streamed = False
        _pool.add(self)

    @classmethod
    def open(cls, path: Path) -> InputFile:
        """Open the regular file at ``path``, or where a link there leads.

        Users link models into the folders of several programs.

        Raises InputMissing when there is no such file or it may not be read, DataError for a folder, FIFO, socket or device.
        """
        real_path = path
        try:
            status = os.lstat(path)
            if stat.S_ISLNK(status.st_mode):
                real_path = _target_of(path)
                status = os.lstat(real_path)
            _require_regular(status, path)  # before opening: opening some devices is an action
            fd = system.open_input(real_path)
        except OSError as error:
            raise _cannot_open(error, path) from None
        try:
            status = _status_of(fd, real_path)
            _require_regular(status, path)
        except BaseException:
            system.close(fd)
            raise
        return cls(path, real_path, fd, status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; views that `window` returned stay readable until they are released. Idempotent.

        What is left in the page cache of a file that was streamed, and was not there before, is let go of.
        """
        fd = _pool.remove(self)
        with self._lock:
            self._closed = self._tried_to_map = True
            self._mapping = None
        self._close(fd)
        self._cached_before = None  # a file that is closed is not asked what it knew

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the bytes at ``offset``.

        Raises ValueError past the end of the file, DataError when the file became shorter than it was at
        the opening, StorageError when the disk fails.
        """
        view = buffer.cast("B")
        self._require_inside(offset, len(view))
        done = 0
        with _pool.using(self) as fd:
            while done < len(view):
                try:
                    count = system.read_at(fd, view[done:], offset + done)
                except OSError as error:
                    raise _cannot_read(error, self.path) from error
                if count == 0:
                    raise self._shrank(offset + done)
                done += count

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``; raises as `read_into` does."""
        self._require_inside(offset, size)
        buffer = bytearray(size)
        if size:
            self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    @property
    def can_map(self) -> bool:
        """Whether the system maps the file.

        Some network file systems refuse it, and no system maps an empty file.
        """
        return self._map() is not None

    def window(self, offset: int, size: int) -> memoryview:
        """A read-only view of ``size`` bytes at ``offset``, in memory when the call returns.

        The view is of one shared mapping of the file, so it costs no copy; where `can_map` is False it is a
        view of a copy. Give it back with `release`. Raises as `read_into` does. A file that another program
        cuts short while a view is in use ends the process (SIGBUS), as with every mapping.
        """
        mapping = self._map()
        if mapping is None or size == 0:
            return memoryview(self.read(offset, size))
        self._require_inside(offset, size)
        self._populate(mapping, offset, size)
        return memoryview(mapping.bytes)[offset : offset + size]

    def release(self, offset: int, size: int) -> None:
        """Let go of these bytes, in a window or a buffer: their pages need not stay. The file is streamed.

        The pages of a window are given back, so that the process does not grow with the file. That rounds outwards to whole pages: a page shared
        with a neighbouring window is faulted in again from the page cache, whereas rounding inwards would keep one page per window for ever.
        The page cache lets go of what lies some way behind, but for what was there before this process: see `page_cache`.
        """
        self._require_inside(offset, size)
        self._streamed = True
        mapping = self._mapping  # held until madvise returns: an address used after unmapping hits other memory
        if mapping is not None and size:
            start = offset - offset % mmap.PAGESIZE
            try:
                system.advise(mapping.address + start, offset + size - start, system.MADV_DONTNEED)
            except OSError as error:
                if error.errno not in system.UNSUPPORTED:
                    raise _cannot_read(error, self.path) from error
        if page_cache.ends_block(offset, size):
            self._hint(page_cache.CachedBefore.let_go_behind, offset, size)

    def will_need(self, offset: int, size: int) -> None:
        """Start reading these bytes into the page cache and return at once; a hint that never fails."""
        with suppress(*UNREADABLE), _pool.using(self) as fd:
            system.read_ahead(fd, offset, size)

    def bring(self, offset: int, size: int) -> bool:
        """Read these bytes into the page cache.

        Returns when they are there; False where that cannot be done. Raises `UNREADABLE`.
        """
        with _pool.using(self) as fd:
            return system.bring(fd, offset, size)

    def forget(self, offset: int, size: int) -> None:
        """Let these bytes go from the page cache, unless they were there before.

        They go at once, but for what was there before this process; a hint that never fails.
        """
        self._hint(page_cache.CachedBefore.let_go, offset, size)

    def check_unchanged(self) -> None:
        """Raises DataError unless the name still leads to the unchanged file.

        The file opened has to be the one, with the size and times of then.
        """
        try:
            # By name: while the file is open nothing else can get its inode, so this tells edits and renames.
            now = identity_of(os.stat(self._real_path))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR):
                raise DataError(f'"{self.path}" was removed while it was read; run again.') from None
            raise _cannot_read(error, self.path) from error
        if now != self.identity:
            raise self._changed()

    def _open_again(self) -> int:
        if self._closed:
            raise ValueError(f'"{self.path}" was closed')
        try:
            fd = system.open_input(self._real_path)
        except OSError as error:
            raise _cannot_open(error, self.path) from None
        if identity_of(_status_of(fd, self._real_path)) != self.identity:
            system.close(fd)
            raise self._changed()
        return fd

    def _park(self) -> None:
        fd, self._fd = self._fd, -1
        self._mapping, self._tried_to_map = None, False  # a mapping holds a descriptor of its own
        self._close(fd)

    def _close(self, fd: int) -> None:
        if fd < 0:
            return
        if self._streamed and self._cached_before:
            self._cached_before.let_go(fd, 0, self.size)
        system.close(fd)

    def _hint(self, let_go: Callable[[page_cache.CachedBefore, int, int, int], None], offset: int, size: int) -> None:
        before = self._cached_before
        if before is not None:
            with suppress(*UNREADABLE), _pool.using(self) as fd:
                let_go(before, fd, offset, size)

    def _changed(self) -> DataError:
        return DataError(
            f'"{self.path}" changed while it was read (its size, times or inode differ); '
            "run again when nothing writes to it."
        )

    def _map(self) -> _Mapping | None:
        with self._lock:
            if not self._tried_to_map:
                with _pool.using(self) as fd:
                    self._tried_to_map = True
                    if self.size and system.network_file_system(fd) is None:
                        self._mapping = _map_whole(fd, self.size)
                    return self._mapping
            return self._mapping

    def _populate(self, mapping: _Mapping, offset: int, size: int) -> None:
        """Fault a window in with one call, which also turns the SIGBUS of a cut file into an error."""
        start = offset - offset % mmap.PAGESIZE
        try:
            system.advise(mapping.address + start, offset + size - start, system.MADV_POPULATE_READ)
        except OSError as error:
            if error.errno in system.UNSUPPORTED:  # before Linux 5.14: pages are faulted in one by one
                return
            with _pool.using(self) as fd:
                end = os.fstat(fd).st_size
            if end < offset + size:
                raise self._shrank(end) from None
            raise _cannot_read(error, self.path) from error

    def _require_inside(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f'"{self.path}" has {self.size} bytes; bytes {offset} to {offset + size} are not in it')

    def _shrank(self, end: int) -> DataError:
        return DataError(
            f'"{self.path}" shrank while it was read, from {self.size} bytes to {end}; '
            "run again when nothing writes to it."
        )


@dataclass(frozen=True, slots=True)
class _Mapping:
    """The read-only shared mapping of a whole file, and its address."""

    bytes: mmap.mmap
    address: int


_pool = Pool(part=4)  # of each two descriptors at most: a mapping has a second one


def _map_whole(fd: int, size: int) -> _Mapping | None:
    """The mapping of a file; None where the system refuses to map it."""
    import numpy

    try:
        mapping = mmap.mmap(fd, size, access=mmap.ACCESS_READ)
    except (OSError, ValueError):  # ENODEV, ENOMEM, EACCES; ValueError: the file is already shorter
        return None
    return _Mapping(mapping, numpy.frombuffer(mapping, dtype=numpy.uint8).ctypes.data)


def _cannot_open(error: OSError, path: Path) -> InputMissing | DataError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return InputMissing(f'"{path}" does not exist; check the path.')
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputMissing(f'"{path}" may not be read (permission denied); check its permissions.')
    if error.errno == errno.ELOOP:
        return DataError(f'"{path}" became a link while it was opened; run again.')
    return InputMissing(f'"{path}" cannot be opened ({error.strerror}); check the path.')


def _cannot_read(error: OSError, path: Path) -> StorageError:
    return StorageError(f'"{path}" could not be read ({error.strerror}); check the disk it lies on.')
