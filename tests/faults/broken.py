"""Commit protocols that are wrong on purpose: every harness must catch the ones it is for.

A harness that cannot see a missing fsync reports no violations either; these tell the two apart.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergetool.checkpoint import files, journal, system
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.targets import attempt


def _no_fsync() -> None:
    """Names before data: the file is renamed while its bytes are only in the page cache."""
    system.fsync = lambda fd: None


def _no_folder_fsync() -> None:
    """Success is said of a name that is only in memory."""
    system.fsync_folder = lambda path: None


def _rename_first() -> None:
    """The temporary gets its final name as soon as it exists, and is written there."""
    created, replace = files.OutputFile.__init__, system.replace

    def create(self: Any, path: Path, shown: Path, size: int) -> None:
        created(self, path, shown, size)
        if path.parent == shown.parent:
            replace(path, shown)

    files.OutputFile.__init__ = create  # type: ignore[method-assign]
    system.replace = system.rename_new = lambda source, target: None


def _finalise_on_exit() -> None:
    """What is there is published when the block is left, by an exception or not."""

    def leave(self: Any, *_: object) -> None:
        if not self._ended and not getattr(self, "_leaving", False):
            self._leaving = True
            for file in [self._file] if isinstance(self, files.StagedFile) else self._files:
                file._damaged = False
            self.publish()

    files._Staged.__exit__ = leave  # type: ignore[method-assign]
    files._Staged.discard = leave  # type: ignore[method-assign]


def _keep_temporaries() -> None:
    """Nothing is removed after an error."""
    files.OutputFile.abandon = lambda self: None  # type: ignore[method-assign]


def _write_inputs() -> None:
    """An input is touched."""
    opened = system.open_input

    def touch(path: Path) -> int:
        if path.suffix == ".safetensors":
            os.utime(path)
        return opened(path)

    system.open_input = touch


def _unlink_while_open() -> None:
    """What Windows does not do: the temporary is removed, then closed."""

    def abandon(self: Any) -> None:
        attempt(system.unlink, self.path)
        attempt(self._close)

    files.OutputFile.abandon = abandon  # type: ignore[method-assign]


def _no_locks() -> None:
    """Two runs on one target do not see each other, and take each other's temporaries for dead ones'."""
    system.try_lock = lambda fd: True


def _no_flock() -> None:
    """Not a wrong protocol: a network file system whose locks do not work, where results must be whole all the same."""
    system.try_lock = lambda fd: None


def _unchecked_inputs() -> None:
    """What is read may change meanwhile."""
    InputFile.check_unchanged = lambda self: None  # type: ignore[method-assign]


def _private_mode() -> None:
    """Output files are for their owner only, as safetensors' own writer makes them."""
    system.open_new = lambda path: os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    system.copy_owner_and_mode = lambda fd, old: None


def _trusted_journal() -> None:
    """What a journal says is believed, and not read again."""
    journal.holds = lambda *_: True


PROTOCOLS = {
    "no fsync": _no_fsync,
    "no folder fsync": _no_folder_fsync,
    "rename first": _rename_first,
    "finalise on exit": _finalise_on_exit,
    "keep temporaries": _keep_temporaries,
    "write inputs": _write_inputs,
    "unlink while open": _unlink_while_open,
    "no locks": _no_locks,
    "no flock": _no_flock,
    "unchecked inputs": _unchecked_inputs,
    "private mode": _private_mode,
    "trusted journal": _trusted_journal,
}


def install(name: str) -> None:
    """Make this process one that follows the wrong protocol ``name``."""
    PROTOCOLS[name]()


@contextmanager
def for_a_while(name: str) -> Iterator[None]:
    """Follow the wrong protocol ``name`` within the block, in this process."""
    places = (system, journal, InputFile, files.OutputFile, files._Staged)
    before = [dict(vars(place)) for place in places]
    install(name)
    try:
        yield
    finally:
        for place, attributes in zip(places, before, strict=True):
            for key, value in attributes.items():
                if vars(place).get(key) is not value:
                    setattr(place, key, value)
            for key in set(vars(place)) - set(attributes):
                delattr(place, key)
