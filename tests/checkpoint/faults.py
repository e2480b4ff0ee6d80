"""Faults for the commit protocol, and the one checker that every fault test uses."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.checkpoint import system

if TYPE_CHECKING:  # half the start-up time of the programs that test_kill kills
    import pytest

# Every call by which an output changes the disk, or could fail before it does.
CALLS = (
    "open_lock",
    "open_new",
    "open_stage",
    "close",
    "cut",
    "free_space",
    "allocate",
    "write_at",
    "start_write_back",
    "fsync",
    "fsync_folder",
    "copy_owner_and_mode",
    "replace",
    "rename_new",
    "exchange",
    "unlink",
    "make_folder",
    "remove_folder",
    "lock_folder",
)


class Fault:
    """Makes the Nth of all system calls fail; N = 0 only counts. ``fired`` is the call that failed, if any.

    ``forever`` makes every later call of the same name fail too, as a full disk or a dead one does.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, nth: int, number: int, *, forever: bool = False) -> None:
        self.calls: list[str] = []
        self.fired: str | None = None
        self._nth = nth
        self._number = number
        self._forever = forever
        for name in CALLS:
            monkeypatch.setattr(system, name, functools.partial(self._call, name, getattr(system, name)))

    def _call(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append(name)
        if len(self.calls) == self._nth or (self._forever and name == self.fired):
            self.fired = name
            if name == "close":
                call(*arguments)  # a close that reports a lost write has closed nevertheless
            raise OSError(self._number, os.strerror(self._number))
        return call(*arguments)


Content = bytes | dict[str, bytes] | None
Seen = dict[Path, tuple[bytes, int]]
"""Bytes and mtime_ns of input files."""


def content_of(path: Path) -> Content:
    """The bytes of a file, those of each file of a folder, None for nothing."""
    if path.is_dir():
        return {entry.name: entry.read_bytes() for entry in path.iterdir()}
    return path.read_bytes() if path.exists() else None


def seen(paths: Iterable[Path]) -> Seen:
    """What input files hold and when they were last written, for `violations` to compare with later."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def beside(target: Path) -> tuple[list[Path], list[Path]]:
    """The temporaries, with a journal not counted beside its stage, and the lock files next to a target."""
    return _sorted_out(target, sorted(path.name for path in target.parent.glob(".*mergetool*")))


def _sorted_out(target: Path, names: Iterable[str]) -> tuple[list[Path], list[Path]]:
    locks = [name for name in names if name == f".{target.name}.mergetool.lock"]
    stages = {name for name in names if ".mergetool" in name} - set(locks)
    alone = sorted(name for name in stages if name.removesuffix(".journal") not in stages - {name})
    return [target.with_name(name) for name in alone], [target.with_name(name) for name in locks]


Look = Callable[[Path], tuple[Content, list[str]]]
"""What is at a target, and the names in its folder."""


def look(target: Path) -> tuple[Content, list[str]]:
    """Of the real file system."""
    return content_of(target), sorted(path.name for path in target.parent.iterdir())


def violations(
    target: Path,
    old: Content,
    new: Content,
    *,
    killed: bool = False,
    succeeded: bool = False,
    failed: bool = False,
    inputs: Seen | None = None,
    errors: str | None = None,
    look: Look = look,
) -> list[str]:
    """What the commit protocol promised and a run did not keep: an empty list for a sound run.

    (a) The target is the old output or the new one. (b) A run that ``succeeded`` left the new one. (c) One that ``failed``
    left the old one, and neither left a temporary or a lock. (d) One that was ``killed`` left at most one temporary. (e) The
    ``inputs`` hold what they held and were not written. (f) What a run that failed says, ``errors``, is one sentence. That a
    run after a fault makes the new output (g) is asked by giving its target to this function again, as ``succeeded``.
    """
    found, names = look(target)
    temporaries, locks = _sorted_out(target, names)
    broken = []
    if found not in (old, new):
        broken.append(f"{target.name} is neither the old nor the new output")
    if succeeded and found != new:
        broken.append("success was reported but the new output is not there")
    if failed and found != old:
        broken.append("failure was reported but the target changed")
    if len(temporaries) > (1 if killed else 0):
        broken.append(f"left behind: {[path.name for path in temporaries]}")
    if locks and not killed:
        broken.append("the lock file was left behind")
    for path, (data, written) in (inputs or {}).items():
        if not path.is_file() or path.read_bytes() != data or path.stat().st_mtime_ns != written:
            broken.append(f"the input {path.name} was changed")
    if errors is not None and not is_one_sentence(errors):
        broken.append(f"not one sentence: {errors!r}")
    return broken


def is_one_sentence(errors: str) -> bool:
    """Whether a failed run said one line on stderr, as `mergetool.cli.console.fail` prints it."""
    lines = errors.splitlines()
    return len(lines) == 1 and lines[0].startswith("mergetool: ") and lines[0].endswith(".")
