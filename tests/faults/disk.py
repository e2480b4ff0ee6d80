"""A disk in memory behind the calls of `mergetool.checkpoint.system`, with its own idea of what a power cut leaves.

Files and folders are inodes. What is written or named goes to the page cache; a sync of a file brings its bytes to the disk, and
a sync of a folder its names. A power cut keeps what was synced and any part of the rest, in pieces and out of order: more than a
real file system would lose, as POSIX allows. ``rules`` are those of another system: "windows" or "caseless".
"""

from __future__ import annotations

import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mergetool.checkpoint import output_file, system
from mergetool.checkpoint.descriptors import Pool
from mergetool.checkpoint.names import folded
from tests.checkpoint.faults import CALLS, Content

Kind = Literal["ENOSPC", "EIO", "EINTR", "short", "kill", "power"]
FIRST_FD = 1 << 20
SECTOR = 512


class Killed(BaseException):
    """The process is gone: nothing it would still do happens."""


@dataclass(eq=False)
class Inode:
    """A file (``names`` None) or a folder. ``kept`` and ``kept_names`` are on the disk, ``pending`` is not yet."""

    number: int
    data: bytearray = field(default_factory=bytearray)
    kept: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    names: dict[str, Inode] | None = None
    kept_names: dict[str, Inode] = field(default_factory=dict)
    pending_names: list[tuple[str, str, str, Inode | None]] = field(default_factory=list)
    mode: int = 0o644
    locked_by: int | None = None
    opened: int = 0

    def status(self) -> os.stat_result:
        kind = stat.S_IFREG if self.names is None else stat.S_IFDIR
        return os.stat_result(
            (kind | self.mode, self.number, 7, 1, os.geteuid(), os.getegid(), len(self.data), 0, 0, 0)
        )


class Disk:
    """One folder, ``root``, on a disk in memory; paths elsewhere go to the real system.

    ``faults`` says what happens at which call, counted from 1 over all of `CALLS`; ``forever`` repeats an error at every later call
    of that name. ``fired`` lists what happened.
    """

    def __init__(self, root: Path, *, rules: str = "") -> None:
        self.root = root
        self._root = str(root)
        self.rules = rules
        self.capacity = 1 << 30
        self.folder = Inode(1, names={})
        self._numbers = iter(range(2, 1 << 60))
        self.plan({})

    def plan(self, faults: dict[int, Kind], *, forever: bool = False) -> None:
        """Begin a new process with these faults before it."""
        self.faults, self.forever = faults, forever
        self.calls: list[str] = []
        self.fired: list[tuple[str, Kind]] = []
        self._files: dict[int, Inode] = {}
        self._fds = iter(range(FIRST_FD, 1 << 60))
        self._dead = False
        # A killed run lets go of nothing, but its pool of open files is gone with it: it would close descriptors of the next.
        output_file._pool = Pool(output_file._pool._part)
        for inode in self._inodes():
            inode.locked_by, inode.opened = None, 0

    # ---- what tests do to it

    def put(self, name: str, content: Content) -> None:
        """Something that is there, and on the disk."""
        assert self.folder.names is not None
        self.folder.names.pop(name, None)
        if isinstance(content, dict):
            made = self._new(names={part: self._stored(data) for part, data in content.items()})
            made.kept_names = dict(made.names or {})
            self.folder.names[name] = made
        elif content is not None:
            self.folder.names[name] = self._stored(content)
        self.folder.kept_names = dict(self.folder.names)
        self.folder.pending_names.clear()

    def clear(self) -> None:
        """An empty disk."""
        self.folder = Inode(1, names={})

    def look(self, target: Path) -> tuple[Content, list[str]]:
        """For `violations`."""
        assert self.folder.names is not None
        found = self.folder.names.get(target.name)
        content: Content = None
        if found is not None:
            content = bytes(found.data) if found.names is None else {n: bytes(i.data) for n, i in found.names.items()}
        return content, sorted(self.folder.names)

    def power_cut(self, draw: random.Random, how: Literal["nothing", "names", "any"]) -> None:
        """Keep what was synced, and of the rest nothing, only the names, or any part of it."""
        for inode in list(self._inodes()):
            if inode.names is None:
                kept = bytearray(inode.kept)
                for offset, data in inode.pending:
                    if how == "any" and draw.random() < 0.5:
                        length = min(len(data), SECTOR * draw.randint(1, 1 + len(data) // SECTOR))
                        if len(kept) < offset + length:
                            kept.extend(bytes(offset + length - len(kept)))
                        kept[offset : offset + length] = data[:length]
                inode.data, inode.kept, inode.pending = bytearray(kept), bytes(kept), []
            else:
                for operation in inode.pending_names:
                    if how == "names" or (how == "any" and draw.random() < 0.5):
                        _rename(inode.kept_names, *operation)
                inode.names, inode.pending_names = dict(inode.kept_names), []

    def _inodes(self) -> Iterator[Inode]:
        seen: set[int] = set()
        todo = [self.folder]
        while todo:
            inode = todo.pop()
            if inode.number in seen:
                continue
            seen.add(inode.number)
            yield inode
            todo += [*(inode.names or {}).values(), *inode.kept_names.values()]
            todo += [other for *_, other in inode.pending_names if other is not None]

    def _new(self, **fields: Any) -> Inode:
        return Inode(next(self._numbers), **fields)

    def _stored(self, data: bytes) -> Inode:
        return self._new(data=bytearray(data), kept=data)

    # ---- names

    def _place(self, path: Path) -> tuple[Inode, str]:
        """The folder that a path is in, and the name it has there."""
        above, _, last = str(path).rpartition("/")
        folder = self.folder if above == self._root else self._get(path.parent)
        if self.rules in ("windows", "caseless"):
            names = folder.names or {}
            if last not in names:
                return folder, next((name for name in names if folded(name) == folded(last)), last)
        return folder, last

    def _get(self, path: Path) -> Inode:
        if str(path) == self._root:
            return self.folder
        folder, name = self._place(path)
        found = (folder.names or {}).get(name)
        if found is None:
            raise _error(errno.ENOENT)
        return found

    def _change(self, path: Path, operation: str, other: str = "", inode: Inode | None = None) -> None:
        folder, name = self._place(path)
        assert folder.names is not None
        step = (operation, name, other, inode)
        _rename(folder.names, *step)
        folder.pending_names.append(step)

    # ---- the calls

    def call(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """A call of `system`: counted, failed if it is its turn, and done here if it is about this disk."""
        if self._dead:
            raise Killed
        kind: Kind | None = None
        if name in CALLS:
            self.calls.append(name)
            kind = self.faults.get(len(self.calls))
            if kind is None and self.forever and self.fired and name == self.fired[0][0]:
                kind = self.fired[0][1]
        if kind == "short" and name != "write_at":
            kind = None
        if kind is not None:
            self.fired.append((name, kind))
            if kind in ("kill", "power"):
                self._dead = True
                raise Killed
            if kind == "short":
                fd, data, offset = arguments
                return self.write_at(fd, data[: len(data) // 2 or 1], offset)
            if name == "close":
                self._do(name, real, arguments)  # a close that reports a lost write has closed nevertheless
            raise _error(getattr(errno, kind))
        return self._do(name, real, arguments)

    def _do(self, name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        first = arguments[0]
        here = first in self._files if isinstance(first, int) else str(first).startswith(self._root)
        return getattr(self, name)(*arguments) if here else real(*arguments)

    def _open(self, inode: Inode) -> int:
        fd = next(self._fds)
        self._files[fd] = inode
        inode.opened += 1
        return fd

    def open_input(self, path: Path) -> int:
        return self._open(self._get(path))

    open_stage = open_input

    def open_new(self, path: Path) -> int:
        folder, name = self._place(path)
        if name in (folder.names or {}):
            raise _error(errno.EEXIST)
        made = self._new()
        self._change(path, "link", inode=made)
        return self._open(made)

    def open_lock(self, path: Path) -> int:
        try:
            return self._open(self._get(path))
        except FileNotFoundError:
            return self.open_new(path)

    def close(self, fd: int) -> None:
        inode = self._files.pop(fd)
        inode.opened -= 1
        if inode.locked_by == fd:
            inode.locked_by = None

    def read_at(self, fd: int, buffer: memoryview, offset: int) -> int:
        data = self._files[fd].data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def allocate(self, fd: int, size: int) -> None:
        self._write(self._files[fd], 0, bytes(size))

    def write_at(self, fd: int, data: memoryview, offset: int) -> int:
        self._write(self._files[fd], offset, bytes(data))
        return len(data)

    def _write(self, inode: Inode, offset: int, data: bytes) -> None:
        if len(inode.data) < offset:
            inode.data.extend(bytes(offset - len(inode.data)))
        inode.data[offset : offset + len(data)] = data
        inode.pending.append((offset, data))

    def cut(self, fd: int) -> None:
        inode = self._files[fd]
        inode.data.clear()

    def start_write_back(self, fd: int, offset: int, size: int) -> None:
        """Nothing is certain until it is synced."""

    def forget(self, fd: int, offset: int, size: int) -> None:
        """A hint."""

    def fsync(self, fd: int) -> None:
        inode = self._files[fd]
        inode.kept, inode.pending = bytes(inode.data), []

    def fsync_folder(self, path: Path) -> None:
        inode = self._get(path)
        inode.kept_names, inode.pending_names = dict(inode.names or {}), []

    def copy_owner_and_mode(self, fd: int, old: os.stat_result) -> None:
        self._files[fd].mode = old.st_mode & 0o777

    def _require_closed(self, *inodes: Inode | None) -> None:
        """Windows renames and removes nothing that is open."""
        if self.rules == "windows" and any(inode is not None and inode.opened for inode in inodes):
            raise _error(errno.EACCES)

    def replace(self, source: Path, target: Path) -> None:
        inode = self._get(source)
        folder, name = self._place(target)
        self._require_closed(inode, (folder.names or {}).get(name))
        self._change(source, "rename", name, inode)

    def rename_new(self, source: Path, target: Path) -> None:
        folder, name = self._place(target)
        if name in (folder.names or {}):
            raise _error(errno.EEXIST)
        self.replace(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        if self.rules == "windows":
            raise _error(errno.ENOSYS)
        _, name = self._place(other)
        self._get(one), self._get(other)
        self._change(one, "exchange", name)

    def unlink(self, path: Path) -> None:
        inode = self._get(path)
        if inode.names is not None:
            raise _error(errno.EISDIR)
        self._require_closed(inode)
        self._change(path, "unlink")

    def make_folder(self, path: Path) -> None:
        folder, name = self._place(path)
        if name in (folder.names or {}):
            raise _error(errno.EEXIST)
        self._change(path, "link", inode=self._new(names={}, mode=0o755))

    def remove_folder(self, path: Path) -> None:
        inode = self._get(path)
        if inode.names:
            raise _error(errno.ENOTEMPTY)
        self._change(path, "unlink")

    def try_lock(self, fd: int) -> bool | None:
        if self.rules == "windows":
            return None
        inode = self._files[fd]
        if inode.locked_by not in (None, fd):
            return False
        inode.locked_by = fd
        return True

    def lock_folder(self, path: Path) -> int | None:
        if self.rules == "windows":
            return None
        fd = self._open(self._get(path))
        self.try_lock(fd)
        return fd

    def free_space(self, folder: Path) -> int | None:
        return self.capacity

    def status(self, path: Path) -> os.stat_result | None:
        try:
            return self._get(path).status()
        except FileNotFoundError:
            return None

    def status_of(self, fd: int) -> os.stat_result:
        return self._files[fd].status()

    def names_in(self, folder: Path) -> list[str]:
        return sorted(self._get(folder).names or {})


def _rename(names: dict[str, Inode], operation: str, name: str, other: str, inode: Inode | None) -> None:
    """One change of a folder's names, on what is there: a power cut may have left out those before it."""
    if operation == "link":
        assert inode is not None
        names[name] = inode
    elif operation == "unlink":
        names.pop(name, None)
    elif operation == "rename":
        assert inode is not None
        if names.get(name) is inode:
            del names[name]
        names[other] = inode
    elif name in names and other in names:
        names[name], names[other] = names[other], names[name]


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


METHODS = (
    *CALLS,
    "open_input",
    "read_at",
    "try_lock",
    "forget",
    "status",
    "status_of",
    "names_in",
)


@contextmanager
def installed(disk: Disk) -> Iterator[None]:
    """Within the block `system` is about ``disk``."""
    with pytest.MonkeyPatch.context() as patch:
        for name in dict.fromkeys(METHODS):
            real = getattr(system, name)
            patch.setattr(system, name, lambda *arguments, n=name, r=real: disk.call(n, r, arguments))
        if disk.rules == "windows":
            patch.setattr(system, "FCNTL", None)
            patch.setattr(system, "WINDOWS", True)
        yield
