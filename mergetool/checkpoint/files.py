"""Writing outputs so that a name never leads to half a file: staged beside the target, published by one rename.

The commit protocol. Whatever fails, at whatever moment, the target is the complete old file or the complete
new one:

1. `targets.TargetClaim` resolves the target, refuses what may not be replaced, locks it, removes what dead
   runs left, and checks the free space.
2. The bytes go to ``.NAME.mergetool-RANDOM`` in the same folder, its blocks reserved at once.
3. ``publish`` syncs it, checks that no input changed, renames it over the target, and syncs the folder.
   Any error before the rename removes the temporary file. A failed sync is never tried again: the kernel
   reports lost pages only once, so a second one can succeed without them.

Only `system`, `targets` and this module open for writing, rename or unlink.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from mergetool.checkpoint import system
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted, why_not_plain
from mergetool.checkpoint.targets import TargetClaim, attempt, belongs_to_model_folder, remove_model_folder
from mergetool.errors import OutputError, StorageError

KEPT_BEHIND = 8
"""Calls of `OutputFile.flush_behind` whose bytes stay in the page cache, so that they are on the disk when they are let go of."""


class OutputFile:
    """One file being written under a temporary name: ``size`` bytes, zero until written.

    ``shown`` is the path that errors name, the one the user asked for.
    """

    def __init__(self, path: Path, shown: Path, size: int) -> None:
        """Create the file, which must not exist yet, lock it and reserve its blocks; raises OutputError."""
        self.path = path
        self.size = size
        self._shown = shown
        self._lock = threading.Lock()
        self._writers = 0
        self._behind: deque[tuple[int, int]] = deque()
        memory = system.main_memory()
        self._is_large = memory is not None and size > memory // 4
        self._closing = False
        self._damaged = False
        with system.explained(shown, "creating it"):
            self._fd = system.open_new(path)
            try:
                system.try_lock(self._fd)  # tells a later run that this one is alive
                system.allocate(self._fd, size)
            except BaseException:
                self.abandon()
                raise

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
        """Start writing these bytes to the disk, so that little is left for the sync at the end.

        A file of more than a quarter of the memory lets go of what was begun `KEPT_BEHIND` calls before and is on the disk by now: the
        search for pages to reclaim took two thirds of the system's time of a run that wrote 12.3 GB (18 s of 25 on 24 GB).
        """
        self._require_inside(offset, size)
        with self._writing("writing") as fd:
            system.start_write_back(fd, offset, size)
            if self._is_large:
                self._behind.append((offset, size))
                if len(self._behind) > KEPT_BEHIND:
                    system.forget(fd, *self._behind.popleft())

    def copy_owner_and_mode(self, claim: TargetClaim) -> None:
        """Take over owner and permissions of the file that will be replaced, if there is one."""
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
        with system.explained(self._shown, "closing"):
            self._close()

    def abandon(self) -> None:
        """Close and remove the file. Idempotent; a failure is ignored, because the next run removes it too."""
        attempt(system.unlink, self.path)
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
            with system.explained(self._shown, action):
                yield self._fd
        except BaseException:
            self._damaged = True
            raise
        finally:
            with self._lock:
                self._writers -= 1
                late = self._closing and self._writers == 0
            if late:
                attempt(system.close, self._fd)

    def _close(self) -> None:
        with self._lock:
            if self._closing:
                return
            self._closing = True
            idle = self._writers == 0
        if idle:
            system.close(self._fd)

    def _require_inside(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f'"{self._shown}" has {self.size} bytes; bytes {offset} to {offset + size} are outside')


class _Staged(ABC):
    """What a staged file and a staged folder share: a claim that ends with `publish` or `discard`."""

    def __init__(self, claim: TargetClaim) -> None:
        self._claim = claim
        self._prepared = False
        self._ended = False

    @property
    def target(self) -> Path:
        """The path that `publish` makes or replaces, with links resolved."""
        return self._claim.path

    @property
    def removed(self) -> tuple[Path, ...]:
        """What dead runs on the same output had left, and staging this one deleted."""
        return self._claim.removed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def prepare(self) -> None:
        """Bring what was written to stable storage and check that it may be published; `publish` then only renames.

        Raises as `publish` does, with the old target untouched and nothing left behind.
        """
        if self._ended:
            raise ValueError(f'"{self.target}" was already published or discarded')
        try:
            if not self._prepared:
                self._finish()
                self._prepared = True
            self._claim.check_inputs()
            self._claim.check_replaceable()
        except BaseException:
            self.discard()
            raise

    def publish(self) -> None:
        """Make the target the complete new output, on stable storage when the call returns.

        Raises, with the old target untouched and nothing left behind, StorageError or OutputError when the
        storage fails, DataError when an input changed meanwhile. Only when the very last step fails, the
        sync of the folder after the rename, is the new output already in place; the StorageError says so.
        """
        self.prepare()
        try:
            with system.explained(self.target, "publishing"):
                self._rename()
        except BaseException:
            self.discard()
            raise
        self._ended = True
        try:
            system.fsync_folder(self.target.parent)
            self._delete_replaced()
        except OSError as error:
            raise StorageError(
                f'"{self.target}" is in place, but syncing its folder failed ({error.strerror}), '
                "so a power cut may undo it; check the disk."
            ) from error
        finally:
            self._claim.release()

    def discard(self) -> None:
        """Remove everything staged and let go of the target, which keeps its old bytes. Idempotent."""
        if not self._ended:
            self._ended = True
            self._abandon()
            self._claim.release()

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _rename(self) -> None: ...

    @abstractmethod
    def _abandon(self) -> None: ...

    @abstractmethod
    def _delete_replaced(self) -> None:
        """Delete what the rename put aside."""


class StagedFile(_Staged):
    """One output file of a known size, written in any order and from any thread, published whole or not at all."""

    def __init__(self, claim: TargetClaim, file: OutputFile) -> None:
        super().__init__(claim)
        self._file = file

    @classmethod
    def create(
        cls, target: Path, size: int, *, overwrite: bool = False, inputs: Sequence[InputFile] = ()
    ) -> StagedFile:
        """Stage ``size`` zero bytes for ``target``; a link is followed, so that the file it leads to is replaced.

        The new file has mode 0666 less the umask, or owner and mode of the file it replaces. Raises
        OutputError when the target may not be written or does not fit, BusyError when another run holds it.
        """
        claim = TargetClaim.claim(target, size, "file", overwrite=overwrite, inputs=inputs)
        try:
            file = OutputFile(claim.temporary(), claim.path, size)
        except BaseException:
            claim.release()
            raise
        staged = cls(claim, file)
        try:
            file.copy_owner_and_mode(claim)
        except BaseException:
            staged.discard()
            raise
        return staged

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``, as `OutputFile.write` does."""
        self._file.write(offset, data)

    def flush_behind(self, offset: int, size: int) -> None:
        """Start writing these bytes to the disk, so that little is left for `publish`."""
        self._file.flush_behind(offset, size)

    def _finish(self) -> None:
        self._file.finish()

    def _delete_replaced(self) -> None:
        """Nothing: the rename replaced the old file itself."""

    def _rename(self) -> None:
        if self._claim.old is None:
            system.rename_new(self._file.path, self.target)
        else:
            system.replace(self._file.path, self.target)

    def _abandon(self) -> None:
        self._file.abandon()


class StagedFolder(_Staged):
    """A folder of output files, published by one rename, or swapped in one step with the folder it replaces."""

    def __init__(self, claim: TargetClaim, path: Path) -> None:
        super().__init__(claim)
        self._path = path
        self._folder_lock: int | None = None
        self._files: list[OutputFile] = []

    @classmethod
    def create(
        cls, target: Path, size: int, *, overwrite: bool = False, inputs: Sequence[InputFile] = ()
    ) -> StagedFolder:
        """Stage an empty folder that will hold ``size`` bytes in all.

        With ``overwrite`` a folder is replaced only if all it holds looks like a model's files, and only
        where the system can swap two folders in one step. Raises OutputError otherwise, BusyError when
        another run holds the target.
        """
        claim = TargetClaim.claim(target, size, "folder", overwrite=overwrite, inputs=inputs)
        path = claim.temporary()
        try:
            with system.explained(claim.path, "creating it"):
                system.make_folder(path)
        except BaseException:
            claim.release()
            raise
        staged = cls(claim, path)
        try:
            staged._lock_and_prove()
        except BaseException:
            staged.discard()
            raise
        return staged

    def add(self, name: str, size: int) -> OutputFile:
        """A new file of ``size`` zero bytes in the folder, to be written before `publish`.

        ``name`` must be a plain name of a kind that model folders hold, else ValueError.
        """
        if why_not_plain(name, "") is not None or not belongs_to_model_folder(name):
            raise ValueError(f"{quoted(name)} is not the plain name of a model folder's file")
        if self._ended:
            raise ValueError(f'"{self.target}" was already published or discarded')
        file = OutputFile(self._path / name, self.target / name, size)
        self._files.append(file)
        return file

    def _lock_and_prove(self) -> None:
        """Lock the folder, and prove before all the bytes are written that it can be swapped with the old one."""
        with system.explained(self.target, "creating it"):
            self._folder_lock = system.lock_folder(self._path)
        if self._claim.old is None:
            return
        probes = [self.add(f"probe-{name}.json", 0) for name in "ab"]
        try:
            system.exchange(probes[0].path, probes[1].path)
        except OSError as error:
            if error.errno not in system.UNSUPPORTED:
                raise system.explain(error, self.target, "creating it") from error
            raise OutputError(
                f'"{self.target}" exists and this system cannot swap two folders in one step; '
                "remove it first or choose another name."
            ) from None
        for probe in probes:
            probe.abandon()
            if probe.path.exists():  # else it would be published with the others
                raise StorageError(f'"{self.target}": removing a file of its own failed; check the disk and run again.')
        self._files.clear()

    def _finish(self) -> None:
        for file in self._files:
            file.finish()
        with system.explained(self.target, "syncing"):
            system.fsync_folder(self._path)

    def _rename(self) -> None:
        if self._claim.old is None:
            system.rename_new(self._path, self.target)
        else:
            if self._folder_lock is not None:
                system.copy_owner_and_mode(self._folder_lock, self._claim.old)
            system.exchange(self._path, self.target)
        self._unlock()

    def _delete_replaced(self) -> None:
        if self._claim.old is not None:
            attempt(remove_model_folder, self._path)  # what stays is removed by the next run

    def _abandon(self) -> None:
        for file in self._files:
            file.abandon()
        attempt(system.remove_folder, self._path)
        self._unlock()

    def _unlock(self) -> None:
        lock, self._folder_lock = self._folder_lock, None
        if lock is not None:
            attempt(system.close, lock)


def write_file(target: Path, data: bytes, *, overwrite: bool = False, inputs: Sequence[InputFile] = ()) -> None:
    """Make ``target`` a file of exactly these bytes, whole or not at all; raises as `StagedFile` does."""
    with StagedFile.create(target, len(data), overwrite=overwrite, inputs=inputs) as staged:
        staged.write(0, memoryview(data))
        staged.publish()
