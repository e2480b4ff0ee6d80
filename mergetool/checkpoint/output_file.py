"""One file under a temporary name, written from any thread. It ends finished, abandoned or left."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergetool.checkpoint import system
from mergetool.checkpoint.descriptors import Pool, Pooled
from mergetool.checkpoint.targets import TargetClaim, attempt, is_own
from mergetool.errors import StorageError

KEPT_BEHIND = 8
"""Calls of `OutputFile.flush_behind` whose bytes stay in the page cache, so that they are on the disk when their pages go."""

SMALL = 64 << 20
"""Bytes of an output that stays in the page cache, such as a LoRA: it costs next to nothing, and the next command reads it."""

READ_BACK = 8 << 20


_pool = Pool(part=8)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class OutputFile(Pooled):
    """One file being written under a temporary name: ``size`` bytes, zero until written.

    ``shown`` is the path that errors name, the one the user asked for. Where too many are open it is closed for a while, with what was
    written on stable storage, and its lock let go of: the lock of a folder of outputs tells that their run is alive.
    """

    def __init__(self, path: Path, shown: Path, size: int, *, left: bool = False) -> None:
        """Create the file, which must not exist yet, lock it and reserve its blocks; raises OutputError.

        With ``left`` it is one that an earlier run left, of this size and this user's; raises StorageError when it is not.
        """
        self.path = path
        self.size = size
        self._shown = shown
        self._lock = threading.Lock()
        self._writers = 0
        self._behind: deque[tuple[int, int]] = deque()
        self._closing = False
        self._damaged = False
        with system.explained(shown, "creating it"):
            self._fd = system.open_stage(path) if left else system.open_new(path)
            try:
                locked = system.try_lock(self._fd)  # tells a later run that this one is alive
                if left:
                    self._require_own(locked)
                else:
                    system.allocate(self._fd, size)
            except BaseException:
                self.abandon()
                raise
            self._identity = _identity(system.status_of(self._fd))
            _pool.add(self)

    def _open_again(self) -> int:
        fd = system.open_stage(self.path)
        if _identity(system.status_of(fd)) != self._identity:
            system.close(fd)
            raise OSError(errno.ESTALE, "another file lies where it was being written")
        return fd

    def _park(self) -> None:
        fd, self._fd = self._fd, -1
        try:
            system.fsync(fd)  # an error that nobody is told of now would not be told again
        except OSError:
            self._damaged = True
        finally:
            attempt(system.close, fd)

    def _require_own(self, locked: bool | None) -> None:
        status = system.status_of(self._fd)
        regular = stat.S_ISREG(status.st_mode) and status.st_size == self.size
        if not (locked and regular and is_own(status)):
            raise OSError(errno.ESTALE, "the file of an earlier run has changed since")

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``; safe from several threads.

        Raises ValueError outside the file, OutputError when the disk is full, StorageError when it fails.
        After an error the file can no longer be published.
        """
        view = data.cast("B")
        self._require_inside(offset, len(view))
        done = 0
        with self._writing("writing") as fd:
            while done < len(view):
                count = system.write_at(fd, view[done:], offset + done)
                if count <= 0:
                    raise StorageError(f'"{self._shown}": the system wrote no bytes; check the disk and run again.')
                done += count

    def flush_behind(self, offset: int, size: int) -> None:
        """Start writing these bytes to the disk, so that little is left to sync.

        Of an output that is not `SMALL` it lets go of what was begun `KEPT_BEHIND` calls before and is on the disk by now, so that the next bytes find
        those pages. Merging three files of 3.3 GB took 18 to 20 s so, and 31 to 35 with the output kept; to read the output afterwards took 22 s and 2.6
        (2 cores, AMD EPYC 9005, 24 GB, other work beside it). Whoever reads it at once loses a sixth of both together, everybody else wins two fifths,
        and what other programs have in the cache stays there.
        """
        self._require_inside(offset, size)
        with self._writing("writing") as fd:
            system.start_write_back(fd, offset, size)
            self._behind.append((offset, size))
            if self.size > SMALL and len(self._behind) > KEPT_BEHIND:
                system.forget(fd, *self._behind.popleft())

    def sync(self) -> None:
        """Return with every byte so far on stable storage. Raises StorageError as `finish` does."""
        with self._writing("syncing") as fd:
            system.fsync(fd)

    def digest(self, offset: int, size: int) -> str:
        """Digest the bytes ``[offset, offset + size)`` as they are read back.

        The digest is BLAKE2b, in hex. Raises StorageError.
        """
        self._require_inside(offset, size)
        digest, done = hashlib.blake2b(digest_size=32), 0
        buffer = memoryview(bytearray(min(size, READ_BACK)))
        with self._writing("reading it back") as fd:
            while done < size:
                count = system.read_at(fd, buffer[: size - done], offset + done)
                if count == 0:
                    raise StorageError(f'"{self._shown}" became shorter while it was written; run again.')
                digest.update(buffer[:count])
                done += count
        return digest.hexdigest()

    def copy_owner_and_mode(self, claim: TargetClaim) -> None:
        """Take over owner and permissions of the file to be replaced, if any."""
        if claim.old is not None:
            with self._writing("setting its permissions") as fd:
                system.copy_owner_and_mode(fd, claim.old)

    def finish(self) -> None:
        """Return with every byte on stable storage and the file closed.

        Raises StorageError when the sync, the closing, or an earlier write failed: the file must then be
        abandoned, never synced again.
        """
        if self._damaged:
            raise StorageError(f'"{self._shown}": an earlier write failed; nothing was published, run again.')
        with self._writing("syncing") as fd:
            system.fsync(fd)
            if self.size > SMALL:
                system.forget(fd, 0, self.size)
        with system.explained(self._shown, "closing"):
            self._close()

    def abandon(self) -> None:
        """Close and remove the file. Idempotent; a failure is ignored, because the next run removes it too."""
        try:
            system.unlink(self.path)
        except FileNotFoundError:
            attempt(self._close)
        except OSError:  # Windows removes no open file
            attempt(self._close)
            attempt(system.unlink, self.path)
        else:
            attempt(self._close)

    def leave(self) -> None:
        """Close the file and let it lie for a run that resumes. Idempotent."""
        attempt(self._close)

    @contextmanager
    def _writing(self, action: str) -> Iterator[int]:
        """The descriptor, which stays open within the block even if another thread abandons the file.

        Otherwise a late write of a worker could go to whatever file got the freed number.
        """
        with self._lock:
            if self._closing:
                raise ValueError(f'"{self._shown}" is no longer open for writing')
            self._writers += 1
        try:
            with system.explained(self._shown, action), _pool.using(self) as fd:
                yield fd
        except BaseException:
            self._damaged = True
            raise
        finally:
            with self._lock:
                self._writers -= 1
                late = self._closing and self._writers == 0
            if late:
                attempt(self._release)

    def _close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            idle = self._writers == 0
        if idle:
            self._release()

    def _release(self) -> None:
        fd = _pool.remove(self)
        if fd >= 0:
            system.close(fd)

    def _require_inside(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f'"{self._shown}" has {self.size} bytes; bytes {offset} to {offset + size} are outside')
