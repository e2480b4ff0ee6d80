"""Claim an output path: check it, lock it, and clear the leftovers of dead runs."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from mergetool.checkpoint import system
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import why_not_on_windows
from mergetool.errors import BusyError, OutputError

TargetKind = Literal["file", "folder"]

JOURNAL = ".journal"
"""The end of the name of a stage's journal (`mergetool.checkpoint.journal`)."""

_MODEL_NAMES = frozenset({".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt", "README", "README.md"})


def belongs_to_model_folder(name: str) -> bool:
    """Whether a file name belongs in a model folder. Safetensors, JSON, licence, README and .gitattributes do."""
    return name.endswith((".safetensors", ".json")) or name in _MODEL_NAMES


def require_folder(folder: Path) -> None:
    """Raises OutputError unless there is a ``folder`` to write in."""
    if not folder.is_dir():
        raise OutputError(
            f'"{folder}" is not a folder; choose another place.'
            if folder.exists()
            else f'the folder "{folder}" does not exist; make it first.'
        )


def resolve_target(target: Path) -> Path:
    """The path to replace: absolute, links followed, its folder proved to exist.

    Raises OutputError for a link that leads nowhere and for a missing folder.
    """
    if target.name in ("", ".", ".."):
        raise OutputError(f'"{target}" does not name an output; add a file or folder name.')
    reason = why_not_on_windows(target.name) if system.WINDOWS else None
    if reason is not None:
        raise OutputError(f'"{target}" cannot be written, because {reason}; choose another name.')
    with system.explained(target, "looking at it"):
        system.status(target)  # a name that is too long, a folder that may not be entered
    try:
        if target.is_symlink():
            return target.resolve(strict=True)
        folder = target.parent.resolve(strict=True)
    except (OSError, RuntimeError):
        if target.is_symlink():
            raise OutputError(f'"{target}" is a link that leads nowhere; remove it or choose another name.') from None
        require_folder(target.parent)
        raise OutputError(f'the folder "{target.parent}" cannot be read; choose another place.') from None
    require_folder(target.parent)
    return folder / target.name


class TargetClaim:
    """The right to replace one output path, held from `claim` until `release`.

    ``path`` is the resolved target, ``old`` the status of what is there now (None: nothing), ``removed``
    what dead runs had left beside it and this claim deleted, ``interrupted`` the stages with a journal that it left.

    The lock file ``.NAME.mergetool.lock`` is a courtesy to a second run on the same output. Results stay
    whole without it (Windows, and network file systems whose locks do not work), because every run
    writes to a name of its own.
    """

    def __init__(self, path: Path, kind: TargetKind, overwrite: bool, inputs: Sequence[InputFile]) -> None:
        self.path = path
        self.old: os.stat_result | None = None
        self.removed: tuple[Path, ...] = ()
        self.interrupted: tuple[Path, ...] = ()
        self._kind = kind
        self._overwrite = overwrite
        self._inputs = tuple(inputs)
        self._lock: int | None = None

    @classmethod
    def claim(
        cls,
        target: Path,
        size: int,
        kind: TargetKind,
        *,
        overwrite: bool,
        inputs: Sequence[InputFile],
        resumes: bool = False,
    ) -> TargetClaim:
        """Lock ``target`` for an output of ``size`` bytes.

        It clears what dead runs left, and checks that there is room.

        Who ``resumes`` is left the stages that have a journal. Raises OutputError when the target may not be replaced or does not fit, BusyError when another run
        holds it.
        """
        path = resolve_target(target)
        claim = cls(path, kind, overwrite, inputs)
        claim.check_replaceable()
        with system.explained(path, "locking"):
            claim._lock = _take_lock(_lock_path(path))
        try:
            with system.explained(path, "preparing"):
                claim._clear(resumes)
                held = sum(map(_allocated, claim.interrupted))
                _require_space(path, max(0, size - held))
        except BaseException:
            claim.release()
            raise
        return claim

    def check_replaceable(self) -> None:
        """Look at the target now, into ``old``. OutputError when it may not be replaced."""
        self.old = _status(self.path)
        if self.old is not None:
            _require_replaceable(self.path, self.old, self._kind, self._overwrite, self._inputs)

    def check_inputs(self) -> None:
        """Raise DataError when an input changed since its opening."""
        for file in self._inputs:
            file.check_unchanged()

    def temporary(self) -> Path:
        """A fresh name beside the target that no other run will choose."""
        return self.path.with_name(f".{self.path.name}.mergetool-{os.urandom(8).hex()}")

    def release(self) -> None:
        """Remove the lock file and let go of it. Idempotent, never raises."""
        lock, self._lock = self._lock, None
        if lock is None:
            return
        # Unlinked while still held: whoever opened it before sees a name that is gone, and opens it anew.
        attempt(system.unlink, _lock_path(self.path))
        attempt(system.close, lock)

    def remove(self, stage: Path) -> None:
        """Remove an interrupted stage and its journal after all."""
        if _remove_if_dead(stage):
            self.removed += (stage,)
        if system.status(stage) is None:
            attempt(system.unlink, stage.with_name(stage.name + JOURNAL))

    def _clear(self, resumes: bool) -> None:
        if self._lock is None:  # without locks nobody can tell a dead run from a living one
            return
        pattern = re.compile(re.escape(f".{self.path.name}.mergetool-") + "[0-9a-f]{16}")
        names = system.names_in(self.path.parent)
        for name in names:
            if pattern.fullmatch(name):
                stage = self.path.with_name(name)
                if resumes and name + JOURNAL in names and _is_dead(stage):
                    self.interrupted += (stage,)
                elif _remove_if_dead(stage):
                    self.removed += (stage,)
        for name in names:  # a journal goes with its stage
            stage_name = name.removesuffix(JOURNAL)
            is_journal = stage_name != name and pattern.fullmatch(stage_name)
            if is_journal and system.status(self.path.with_name(stage_name)) is None:
                attempt(system.unlink, self.path.with_name(name))


def remove_model_folder(folder: Path) -> None:
    """Delete a folder that holds nothing but model files.

    Files that are others' stay, and with them the folder.
    """
    for name in system.names_in(folder):
        item = folder / name
        status = system.status(item)
        if belongs_to_model_folder(name) and status is not None and not stat.S_ISDIR(status.st_mode):
            system.unlink(item)
    system.remove_folder(folder)


def _status(path: Path) -> os.stat_result | None:
    with system.explained(path, "looking at it"):
        return system.status(path)


def _allocated(stage: Path) -> int:
    """Bytes of the disk that a stage takes already."""
    status = system.status(stage)
    if status is None or not stat.S_ISDIR(status.st_mode):
        parts = [status]
    else:
        parts = [system.status(stage / name) for name in system.names_in(stage)]
    return sum(512 * (getattr(part, "st_blocks", None) or 0) for part in parts if part is not None)


def _require_space(path: Path, size: int) -> None:
    free = system.free_space(path.parent)
    if free is not None and free < size:
        raise OutputError(
            f'"{path}" needs {size:,} bytes but only {free:,} are free; free some space or choose another folder.'
        )


def _require_replaceable(
    path: Path, old: os.stat_result, kind: TargetKind, overwrite: bool, inputs: Sequence[InputFile]
) -> None:
    is_folder = stat.S_ISDIR(old.st_mode)
    if not is_folder and not stat.S_ISREG(old.st_mode):
        raise OutputError(f'"{path}" is a device, FIFO or socket; choose another name.')
    if is_folder and kind == "file":
        raise OutputError(f'"{path}" is a folder; name a file in it instead.')
    if not is_folder and kind == "folder":
        raise OutputError(f'"{path}" is a file, but the output is a folder; choose another name.')
    sources = {file.identity[:2]: file for file in inputs}
    entries = _entries(path) if is_folder else {}
    for item, status in {path: old, **entries}.items():
        source = sources.get((status.st_dev, status.st_ino))
        if source is not None:
            raise OutputError(f'"{item}" is the input "{source.path}" itself; choose another output name.')
    if not overwrite:
        raise OutputError(f'"{path}" already exists; choose another name or use `overwrite`.')
    for item, status in entries.items():
        if stat.S_ISDIR(status.st_mode) or not belongs_to_model_folder(item.name):
            raise OutputError(
                f'"{path}" also holds "{item.name}", which is no part of a model folder; '
                "choose another folder or move that away."
            )


def _entries(folder: Path) -> dict[Path, os.stat_result]:
    with system.explained(folder, "listing it"):
        statuses = {folder / name: system.status(folder / name) for name in system.names_in(folder)}
        return {path: status for path, status in statuses.items() if status is not None}


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.mergetool.lock")


def _take_lock(path: Path) -> int | None:
    """The held lock file's descriptor, None where locks do not work; BusyError when another run holds it."""
    if system.FCNTL is None:
        return None
    while True:
        fd = system.open_lock(path)
        mine = False
        try:
            taken = system.try_lock(fd)
            if taken is False:
                raise _busy(fd, path)
            mine = _still_named(fd, path)  # else its last holder unlinked it between our open and our lock
            if mine and taken:
                system.cut(fd)
                system.write_at(fd, memoryview(f"{os.getpid()} {os.uname().nodename}\n".encode()), 0)
                return fd
        except BaseException:
            if mine:
                attempt(system.unlink, path)
            attempt(system.close, fd)
            raise
        if mine:
            system.unlink(path)
        system.close(fd)
        if mine:
            return None


def _busy(fd: int, path: Path) -> BusyError:
    said = bytearray(300)
    count = system.read_at(fd, memoryview(said), 0)
    owner = said[:count].decode("utf-8", "replace").split()
    who = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
    return BusyError(f'{who} is writing the output that "{path}" guards; wait for it to end or choose another name.')


def _still_named(fd: int, path: Path) -> bool:
    status = system.status(path)
    return status is not None and os.path.samestat(system.status_of(fd), status)


def _remove_if_dead(leftover: Path) -> bool:
    """Remove a temporary file or folder unless a living run holds its lock; False when it stays."""
    try:
        fd = system.open_input(leftover)
    except OSError:
        return False
    try:
        if system.try_lock(fd) is not True:
            return False
        if stat.S_ISDIR(system.status_of(fd).st_mode):
            remove_model_folder(leftover)
        else:
            system.unlink(leftover)
    except OSError:  # another user's, or a folder that now holds something else: leave it
        return False
    finally:
        attempt(system.close, fd)
    return True


def _is_dead(leftover: Path) -> bool:
    """Whether no living run holds the lock of a stage."""
    try:
        fd = system.open_input(leftover)
    except OSError:
        return False
    try:
        return system.try_lock(fd) is True
    finally:
        attempt(system.close, fd)


def is_own(status: os.stat_result) -> bool:
    """Whether a stage or journal is this user's and has no other name. Another's could be forged, digests and all."""
    return (not hasattr(os, "geteuid") or status.st_uid == os.geteuid()) and (
        stat.S_ISDIR(status.st_mode) or status.st_nlink == 1
    )


def attempt(call: Callable[..., None], *arguments: object) -> None:
    """Call a clean-up whose failure must not hide the earlier error."""
    try:
        call(*arguments)
    except OSError:
        return
