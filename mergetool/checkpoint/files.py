"""Write outputs so that a name never leads to half a file: stage, then rename once. The stage lies beside the target.

The commit protocol. Whatever fails, at whatever moment, the target is the complete old file or the complete
new one:

1. `targets.TargetClaim` resolves the target, refuses what may not be replaced, locks it, removes what dead
   runs left, and checks the free space.
2. The bytes go to ``.NAME.mergetool-RANDOM`` in the same folder, its blocks reserved at once.
3. ``publish`` syncs it, checks that no input changed, renames it over the target, and syncs the folder.
   Any error before the rename removes the temporary file. A failed sync is never tried again: the kernel
   reports lost pages only once, so a second one can succeed without them.

Only `system`, `targets`, `output_file`, `journal` and this module open for writing, rename or unlink.
"""

from __future__ import annotations

import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from mergetool.checkpoint import system
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted, same_name, why_not_plain
from mergetool.checkpoint.output_file import OutputFile
from mergetool.checkpoint.targets import TargetClaim, attempt, belongs_to_model_folder, is_own, remove_model_folder
from mergetool.errors import OutputError, StorageError

T = TypeVar("T")
Adopt = Callable[[Path], bool]
"""Whether to go on with a stage that an interrupted run left."""


class _Staged(ABC):
    """The common part of a staged file and a staged folder: a claim that ends with `publish`, `discard` or `leave`.

    ``resumed`` says that the stage is one that an interrupted run left.
    """

    def __init__(self, claim: TargetClaim) -> None:
        self._claim = claim
        self.resumed = False
        self._prepared = False
        self._ended = False

    @property
    def target(self) -> Path:
        """The path that `publish` makes or replaces, with links resolved."""
        return self._claim.path

    @property
    def removed(self) -> tuple[Path, ...]:
        """The leftovers of dead runs on the same output, deleted when this one was staged."""
        return self._claim.removed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def prepare(self) -> None:
        """Sync all bytes and check that the output may be published; `publish` then only renames.

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

    @property
    def ended(self) -> bool:
        """Whether it was published, discarded or left."""
        return self._ended

    def leave(self) -> None:
        """Let everything staged lie, for a later run to go on with, and let go of the target. Idempotent."""
        if not self._ended:
            self._ended = True
            self._leave()
            self._claim.release()

    @property
    @abstractmethod
    def path(self) -> Path:
        """The temporary file or folder."""

    @abstractmethod
    def _leave(self) -> None: ...

    @abstractmethod
    def _finish(self) -> None: ...

    @abstractmethod
    def _rename(self) -> None: ...

    @abstractmethod
    def _abandon(self) -> None: ...

    @abstractmethod
    def _delete_replaced(self) -> None:
        """Delete the files that the rename put aside."""


class StagedFile(_Staged):
    """Stages one output file, and publishes it whole or not at all.

    It has a known size, and is written in any order and from any thread.
    """

    def __init__(self, claim: TargetClaim, file: OutputFile) -> None:
        super().__init__(claim)
        self._file = file

    @classmethod
    def create(
        cls,
        target: Path,
        size: int,
        *,
        overwrite: bool = False,
        inputs: Sequence[InputFile] = (),
        adopt: Adopt | None = None,
    ) -> StagedFile:
        """Stage ``size`` zero bytes for ``target``. A link is followed, so that the file it leads to is replaced.

        The new file has mode 0666 less the umask, or owner and mode of the file it replaces. Raises
        OutputError when the target may not be written or does not fit, BusyError when another run holds it.
        With ``adopt`` the bytes are those that an interrupted run staged, if it takes that stage; else they are removed.
        """
        claim = TargetClaim.claim(target, size, "file", overwrite=overwrite, inputs=inputs, resumes=adopt is not None)
        try:
            left = _adopted(claim, adopt, lambda path: OutputFile(path, claim.path, size, left=True))
            file = left or OutputFile(claim.temporary(), claim.path, size)
        except BaseException:
            claim.release()
            raise
        staged = cls(claim, file)
        staged.resumed = left is not None
        try:
            file.copy_owner_and_mode(claim)
        except BaseException:
            staged.discard()
            raise
        return staged

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` at ``offset``, as `OutputFile.write` does."""
        self._file.write(offset, data)

    @property
    def path(self) -> Path:
        return self._file.path

    @property
    def file(self) -> OutputFile:
        """The temporary file itself."""
        return self._file

    def flush_behind(self, offset: int, size: int) -> None:
        """Start writing these bytes to the disk, so that little is left for `publish`."""
        self._file.flush_behind(offset, size)

    def _leave(self) -> None:
        self._file.leave()

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
    """Stages a folder of output files, and publishes it by one rename.

    Where it replaces a folder, the two are swapped in one step.
    """

    def __init__(self, claim: TargetClaim, path: Path) -> None:
        super().__init__(claim)
        self._path = path
        self._folder_lock: int | None = None
        self._files: list[OutputFile] = []

    @classmethod
    def create(
        cls,
        target: Path,
        size: int,
        *,
        overwrite: bool = False,
        inputs: Sequence[InputFile] = (),
        adopt: Adopt | None = None,
    ) -> StagedFolder:
        """Stage an empty folder that will hold ``size`` bytes in all.

        With ``overwrite`` a folder is replaced only if all it holds looks like a model's files, and only
        where the system can swap two folders in one step. Raises OutputError otherwise, BusyError when
        another run holds the target. With ``adopt`` the folder is the one that an interrupted run staged, if it takes that; else that
        is removed.
        """
        claim = TargetClaim.claim(target, size, "folder", overwrite=overwrite, inputs=inputs, resumes=adopt is not None)
        try:
            left = _adopted(claim, adopt, _require_own_folder)
            path = left or claim.temporary()
            if left is None:
                with system.explained(claim.path, "creating it"):
                    system.make_folder(path)
        except BaseException:
            claim.release()
            raise
        staged = cls(claim, path)
        staged.resumed = left is not None
        try:
            staged._lock_and_prove()
        except BaseException:
            staged.discard()
            raise
        return staged

    def add(self, name: str, size: int) -> OutputFile:
        """Add a file of ``size`` zero bytes, to be written before `publish`.

        ``name`` must be a plain name of a kind that model folders hold, and no other file's on a system that ignores case, else
        ValueError. In a folder that was resumed the file may be there already.
        """
        if why_not_plain(name, "") is not None or not belongs_to_model_folder(name):
            raise ValueError(f"{quoted(name)} is not the plain name of a model folder's file")
        if self._ended:
            raise ValueError(f'"{self.target}" was already published or discarded')
        if any(same_name(name, file.path.name) for file in self._files):
            raise ValueError(f"{quoted(name)} is the name of another file in the folder")
        path = self._path / name
        file = self._left(path, size) if self.resumed else None
        self._files.append(file or OutputFile(path, self.target / name, size))
        return self._files[-1]

    def _left(self, path: Path, size: int) -> OutputFile | None:
        """The file of that name and size that the interrupted run left; None, and nothing is there, when there is no such file."""
        if system.status(path) is None:
            return None
        with suppress(OutputError, StorageError):
            return OutputFile(path, self.target / path.name, size, left=True)
        if system.status(path) is not None:
            with system.explained(self.target / path.name, "removing what was left"):
                system.unlink(path)
        return None

    @property
    def path(self) -> Path:
        return self._path

    def _leave(self) -> None:
        for file in self._files:
            file.leave()
        self._unlock()

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
            if system.status(probe.path) is not None:  # else it would be published with the others
                raise StorageError(f'"{self.target}": removing a file of its own failed; check the disk and run again.')
        self._files.clear()

    def _finish(self) -> None:
        for file in self._files:
            file.finish()
        if self.resumed:
            with system.explained(self.target, "clearing it"):
                self._remove_others()
        with system.explained(self.target, "syncing"):
            system.fsync_folder(self._path)

    def _remove_others(self) -> None:
        """Remove an interrupted run's files in the folder that are no part of the output: its probes."""
        names = {file.path.name for file in self._files}
        for name in system.names_in(self._path):
            if name not in names:
                system.unlink(self._path / name)

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


def _adopted(claim: TargetClaim, adopt: Adopt | None, take: Callable[[Path], T]) -> T | None:
    """The first interrupted stage that ``adopt`` accepts and ``take`` can open; every other one is removed."""
    adopted: T | None = None
    for stage in claim.interrupted:
        if adopted is None and adopt is not None and adopt(stage):
            with suppress(OutputError, StorageError):
                adopted = take(stage)
                continue
        claim.remove(stage)
    return adopted


def _require_own_folder(path: Path) -> Path:
    """A staged folder of this user's; raises StorageError for anything else."""
    status = system.status(path)
    if status is None or not stat.S_ISDIR(status.st_mode) or not is_own(status):
        raise StorageError(f'"{path}" is not a folder that an earlier run left.')
    return path


def write_file(target: Path, data: bytes, *, overwrite: bool = False, inputs: Sequence[InputFile] = ()) -> None:
    """Make ``target`` a file of exactly these bytes, whole or not at all. Raises as `StagedFile` does."""
    with StagedFile.create(target, len(data), overwrite=overwrite, inputs=inputs) as staged:
        staged.write(0, memoryview(data))
        staged.publish()
