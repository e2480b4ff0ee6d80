"""Row 4: the power fails. A real run writes to ext4 in a loop image, which is shut down without flushing anything and mounted anew.

ext4's default would hide a missing fsync before a rename, so it is off (``noauto_da_alloc``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.checkpoint.faults import Content, content_of, violations
from tests.faults.kills import lengths, sleep_until_staged, start
from tests.faults.resuming import INTERVAL, RESUMABLE, finished
from tests.faults.tally import Tally
from tests.faults.world import Case, World, clear, put

EXT4_IOC_SHUTDOWN = 0x8004587D
NOTHING_IS_FLUSHED = 2
MEBIBYTES = 16


class Disk:
    """A small ext4 whose power can be cut; ``place`` is where it is mounted."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "disk"
        self._image = folder / "disk.img"
        self.place.mkdir()
        with self._image.open("wb") as file:
            file.truncate(MEBIBYTES << 20)
        _do(
            "mkfs.ext4", "-q", "-b", "1024", "-J", "size=1", "-E", "lazy_itable_init=0,lazy_journal_init=0", self._image
        )
        self._mount()

    def _mount(self) -> None:
        _do("mount", "-o", "loop,noauto_da_alloc,noatime,data=ordered", self._image, self.place)

    def cut(self) -> None:
        """Lose whatever is not on the disk."""
        fd = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, EXT4_IOC_SHUTDOWN, struct.pack("I", NOTHING_IS_FLUSHED))
        finally:
            os.close(fd)

    def restore(self) -> None:
        """Mount it again, as after the power is back; nobody may have a file open on it."""
        _do("umount", self.place)
        self._mount()

    def sync_something(self) -> None:
        """Bring another file to the disk, so that the journal commits whatever renames came before."""
        fd = os.open(self.place / "other", os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"x")
        os.fsync(fd)
        os.close(fd)

    def close(self) -> None:
        """Unmount and delete it."""
        _do("umount", self.place)
        self._image.unlink()


def _do(*command: object) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{command}: {done.stderr}")


@contextlib.contextmanager
def disk(folder: Path) -> Iterator[Disk]:
    """A disk for the block."""
    made = Disk(folder)
    try:
        yield made
    finally:
        made.close()


def prepare(disk: Disk, case: Case, old: Content) -> Path:
    """The target, with ``old`` there and on the disk, in a folder of its own."""
    folder = disk.place / "place"
    if folder.is_dir():
        clear(folder)
    folder.mkdir(exist_ok=True)
    target = folder / case.target
    put(target, old)
    _do("sync", "-f", disk.place)
    return target


def cut(world: World, disk: Disk, *, count: int, seed: int = 4, broken: str = "", again: float = 1.0) -> Tally:
    """``count`` power cuts: at random moments, in the last part of a run, and right after it said that all is well.

    A share of them, ``again``, is followed by a run, with ``--resume`` where the first one had it.
    """
    tally = Tally("4", "power cuts on ext4")
    draw = random.Random(seed)
    took = lengths(world)
    while tally.injected < count and not (broken and tally.violations):
        case = draw.choice(list(world.cases.values()))
        old = draw.choice((None, case.old))
        resumes = case.name in RESUMABLE and draw.random() < 0.3
        more = ["--resume"] if resumes else []
        when = draw.choice(("any time", "while staged", "after the end"))
        target = prepare(disk, case, old)
        run = start(world, case, target, *more, interval=INTERVAL, broken=broken)
        run.go()
        ended = None
        if when == "after the end":
            ended = run.wait()
        else:
            if when == "while staged":
                sleep_until_staged(world, run, target)
                time.sleep(draw.uniform(0, took[case.name] * 0.8))
            else:
                time.sleep(draw.uniform(0, took[case.name] * 1.5))
            ended = run.wait_for(0)
        if draw.random() < 0.7:  # else the bad rename is only in memory too, and nothing shows
            with contextlib.suppress(OSError):
                disk.sync_something()
        disk.cut()
        if ended is None:
            run.kill()
            run.wait()
        disk.restore()
        kept = finished(target)
        said_success = ended is not None and ended.code == 0
        violated = violations(target, old, case.new, killed=True, succeeded=said_success, inputs=world.inputs)
        if not broken and draw.random() < again:
            after = world.run(case, target, *more, interval=INTERVAL)
            if after.code:
                violated.append(f"the run after it failed: {after.code} {after.err}")
            elif content_of(target) != case.new:
                violated.append("the run after it did not make the new output")
        kind = f"{when}{', resumed' if resumes and kept else ''}"
        tally.note(
            kind,
            True,
            violated,
            f"{case.name}, {'new' if old is None else 'replacing'}, {when}, {tally.injected} of seed {seed}",
        )
    return tally
