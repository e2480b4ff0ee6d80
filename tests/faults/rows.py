"""The promises that harnesses of this package prove, with how many faults each takes for CI and before a release."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults import calls, doubles, inputs, kills, power, refusals, resuming, space, systems, together
from tests.faults.tally import Tally
from tests.faults.world import World

TOOLS = ("strace", "mkfs.ext4", "mount", "umount", "sync")


class Bench:
    """Where harnesses work: a folder in memory, and a `World` and a disk that are made when first asked for."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        memory = Path("/dev/shm")
        made = tempfile.TemporaryDirectory(prefix="mergetool-faults-", dir=memory if memory.is_dir() else None)
        self.folder = Path(self._stack.enter_context(made))
        self.folder.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @cached_property
    def world(self) -> World:
        """The commands and their inputs."""
        (self.folder / "world").mkdir()
        return self._stack.enter_context(World(self.folder / "world"))

    @cached_property
    def disk(self) -> power.Disk:
        """A disk whose power can be cut."""
        (self.folder / "ext4").mkdir()
        return self._stack.enter_context(power.disk(self.folder / "ext4"))

    @cached_property
    def empty(self) -> Path:
        """A folder for a disk in memory to stand for."""
        path = self.folder / "empty"
        path.mkdir()
        return path


def why_not_here() -> str | None:
    """Why the harnesses cannot run as this user on this system; None when they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "mounting, tracing and running as another user need root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"there is no {' and no '.join(missing)}" if missing else None


Harness = Callable[[Bench, int, int], Tally]
"""Works on a bench until so many faults have struck, from a seed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One harness: the number of its promise, and how many faults CI and a release want; ``part`` are done and saved at a time."""

    number: str
    name: str
    harness: Harness
    ci: int
    long: int
    part: int


ROWS = (
    Row("1", "calls", lambda b, n, seed: calls.sweep(b.world, count=n, seed=seed, again=0.2), 1000, 20_000, 1000),
    Row("2", "double", lambda b, n, seed: doubles.sweep(b.world, b.empty, count=n, seed=seed), 50_000, 500_000, 50_000),
    Row("3", "kills", lambda b, n, seed: kills.kill(b.world, count=n, seed=seed, again=0.3), 300, 5000, 250),
    Row("4", "power", lambda b, n, seed: power.cut(b.world, b.disk, count=n, seed=seed, again=0.3), 300, 3000, 250),
    Row("5", "signals", lambda b, n, seed: kills.signals(b.world, count=n, seed=seed), 200, 1000, 200),
    Row("6", "space", lambda b, n, seed: space.full(b.world, count=n, seed=seed), 60, 300, 300),
    Row("7", "refusals", lambda b, n, seed: refusals.refuse(b.world), 20, 20, 20),
    Row("8", "inputs", lambda b, n, seed: inputs.change(b.world, count=n, seed=seed), 500, 2500, 500),
    Row("9", "unmapped", lambda b, n, seed: inputs.unmapped(b.world, count=n, seed=seed), 30, 150, 150),
    Row("10", "resume", lambda b, n, seed: resuming.kill_and_resume(b.world, count=n, seed=seed), 300, 1500, 300),
    Row("10t", "tampered", lambda b, n, seed: resuming.tamper(b.world, count=n, seed=seed), 60, 300, 300),
    Row(
        "11",
        "rivals",
        lambda b, n, seed: together.compete(b.world, count=n, seed=seed, most=8 if n > 200 else 3),
        200,
        1000,
        250,
    ),
    Row("32", "caseless", lambda b, n, seed: systems.caseless(b.empty), 60, 60, 60),
    Row("33", "windows", lambda b, n, seed: systems.windows(b.world, b.empty, seed=seed), 40, 40, 40),
    Row("34", "modes", lambda b, n, seed: refusals.modes(b.world), 12, 12, 12),
)
