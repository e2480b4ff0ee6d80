"""Row 6: the disk is full, a file may not become so large, another program takes the space meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.checkpoint.faults import Content
from tests.faults.kills import start
from tests.faults.tally import Tally
from tests.faults.world import Case, World, clear, put


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of ``size`` bytes, rounded up to pages."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def resize(folder: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)


def size_of(content: Content) -> int:
    """Bytes of an output."""
    return sum(map(len, content.values())) if isinstance(content, dict) else len(content or b"")


def full(world: World, *, count: int, seed: int = 6, broken: str = "") -> Tally:
    """Each command on disks that are a page, half and nearly all too small, under file size limits, and in a race for the space."""
    tally = Tally("6", "full disk, file size limit")
    draw = random.Random(seed)
    kinds = ("a page short", "half", "64 KiB", "file size limit", "race")
    with small_disk(world.folder / "small", 1 << 24) as disk:
        for number in range(count):
            if broken and tally.violations:
                break
            kind = kinds[number % len(kinds)]
            case = draw.choice(list(world.cases.values()))
            old = draw.choice((None, case.old))
            clear(disk)
            resize(disk, 1 << 24)
            target = disk / case.target
            put(target, old)
            fired, violated = one(world, disk, case, target, old, kind, draw, broken)
            tally.note(kind, fired, violated, f"{case.name}, {'new' if old is None else 'replacing'}, {kind}, {number}")
    return tally


def one(
    world: World, disk: Path, case: Case, target: Path, old: Content, kind: str, draw: random.Random, broken: str
) -> tuple[bool, list[str]]:
    """Whether the run met the limit, and what it and the next one violated."""
    need, used = size_of(case.new), taken(disk)
    limits = {}
    filler = None
    if kind == "file size limit":
        files = case.new.values() if isinstance(case.new, dict) else [case.new or b""]
        limit = draw.randrange(2000, max(map(len, files)))
        limits = {"RLIMIT_FSIZE": (limit, -1)}
    elif kind == "race":
        filler = threading.Thread(target=fill, args=(disk, draw.uniform(0, 0.03)))
        resize(disk, used + need + (1 << 16) + draw.randrange(1 << 16))
    else:
        room = {"a page short": need - 4097, "half": need // 2, "64 KiB": min(1 << 16, need // 4)}[kind]
        resize(disk, used + room)
    run = start(world, case, target, limits=limits, broken=broken)
    if filler is not None:
        filler.start()
    run.go()
    ended = run.wait()
    if filler is not None:
        filler.join()
    violated = world.judge(case, target, old, ended)
    fired = ended.code == 73
    if kind == "race":  # either may be first
        fired = True
        if ended.code not in (0, 73):
            violated.append(f"exit code {ended.code}: {ended.err}")
    elif kind != "file size limit" and "are free" not in ended.err:
        violated.append(f"not refused before writing: {ended.code} {ended.err}")
    (disk / "filler").unlink(missing_ok=True)
    resize(disk, 1 << 24)
    return fired, violated + world.judge_next(case, target)


def taken(disk: Path) -> int:
    """Bytes of a disk that are in use."""
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def fill(disk: Path, after: float) -> None:
    """Another program that takes what is free."""
    time.sleep(after)
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 14))
