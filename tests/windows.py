"""What Windows forbids and lacks, on this system: a double, since nothing here runs on Windows.

A file that this process has open or mapped is neither renamed, nor replaced, nor removed; there is no fcntl, no positioned or vectored
call, no hint to the page cache, no owner, no folder that can be opened, and no native call.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergetool.checkpoint import system

LACKING = ("preadv", "pwrite", "posix_fadvise", "sendfile", "O_DIRECTORY", "O_NOFOLLOW", "fchown", "fchmod", "geteuid", "getegid", "sysconf", "uname", "sched_getaffinity")  # fmt: skip


class UsedError(PermissionError):
    """What Python raises there for a file that is in use."""

    winerror = 32


def imitate(patch: pytest.MonkeyPatch) -> None:
    """Become Windows, until ``patch`` is undone."""
    for name in LACKING:
        patch.delattr(os, name, raising=False)
    patch.setattr(system, "WINDOWS", True)
    patch.setattr(system, "FCNTL", None)
    patch.setattr(system, "RESOURCE", None)
    patch.setattr(system, "NATIVE", {})
    patch.setattr(system, "WAITS", ())
    patch.setattr(system, "bring", lambda *_: False)
    for name in ("replace", "rename", "unlink", "remove"):
        patch.setattr(os, name, _refusing(getattr(os, name)))


def imitate_in_fork() -> None:
    """Become Windows for good."""
    imitate(pytest.MonkeyPatch())


def _refusing(call: Callable[..., None]) -> Callable[..., None]:
    def guarded(*paths: Any, **options: Any) -> None:
        for path in paths:
            if in_use(path):
                raise UsedError(errno.EACCES, "The process cannot access the file because it is being used", str(path))
        call(*paths, **options)

    return guarded


def in_use(path: str | os.PathLike[str]) -> bool:
    """Whether this process has the file at ``path`` open or mapped."""
    try:
        status = os.stat(path)
    except OSError:
        return False
    opened = Path("/proc/self/fd")
    for fd in opened.iterdir():
        try:
            other = os.stat(opened / fd.name)
        except OSError:  # that of the listing itself
            continue
        if os.path.samestat(other, status):
            return True
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    return any(
        line.split()[3:5] == [device, str(status.st_ino)] for line in Path("/proc/self/maps").read_text().splitlines()
    )
