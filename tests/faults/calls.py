"""Row 1: every system call that a real run makes on its files fails once, fails from then on, or is its last.

strace injects the fault into a process that does the command's own work; a first run under strace lists the calls.
"""

from __future__ import annotations

import contextlib
import random
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint.faults import Content
from tests.faults.tally import Tally
from tests.faults.warm import Ended, Run
from tests.faults.world import Case, World
from tests.patience import HANG

TRACED = (
    "openat",
    "write",
    "pwrite64",
    "fsync",
    "fallocate",
    "ftruncate",
    "sync_file_range",
    "rename",
    "renameat2",
    "mkdir",
    "unlink",
    "rmdir",
    "flock",
    "close",
)
WRITES = ("write", "pwrite64")
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)")


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a thread's ``nth`` call of ``call``, once or to every one from then on."""

    call: str
    nth: int
    kind: str
    forever: bool = False

    def injection(self) -> str:
        """For strace. Its counts are those of each thread."""
        what = {"KILL": "signal=KILL", "nothing": "retval=0"}.get(self.kind, f"error={self.kind}")
        return f"inject={self.call}:{what}:when={self.nth}{'+' if self.forever else ''}"


def kinds(call: str) -> Iterator[tuple[str, bool]]:
    """The faults of one call, with and without those after it."""
    for kind in ("ENOSPC", "EIO"):
        if call != "close":
            yield kind, False
            yield kind, True
    yield "KILL", False
    if call != "close":  # Linux closes all the same, and says so: nothing may be closed twice
        yield "EINTR", False
    if call in WRITES:
        yield "nothing", False  # the system wrote no bytes and calls that a success
        yield "short", False


def trace(world: World, case: Case, target: Path, log: Path, *options: str, **how: object) -> tuple[Run, Ended]:
    """Run a command under strace from its first step on."""
    run = world.program.start(case.command(target), cwd=world.family, gated=True, **how)  # type: ignore[arg-type]
    run.at_gate()
    log.unlink(missing_ok=True)
    command = ["strace", "-f", "-qq", "-y", "-o", log, "-e", f"trace={','.join(TRACED)}", *options, "-p", run.pid]
    with subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE) as tracer:
        status = Path(f"/proc/{run.pid}/status")
        deadline = time.monotonic() + HANG
        while "TracerPid:\t0\n" in status.read_text():
            assert tracer.poll() is None, tracer.stderr and tracer.stderr.read()
            assert time.monotonic() < deadline, "strace does not attach"
            time.sleep(0.0005)
        run.go()
        ended = run.wait()
        with contextlib.suppress(subprocess.TimeoutExpired):
            tracer.wait(timeout=HANG)
    return run, ended


def calls_of(world: World, case: Case, old: Content) -> list[tuple[str, int]]:
    """Every call of an undisturbed run that names a file of the run's, as (call, number in its thread)."""
    target = world.fresh(case, old)
    log = world.scratch / "calls.log"
    _, ended = trace(world, case, target, log)
    assert ended.code == 0, ended.err
    counts: dict[tuple[str, str], int] = {}
    found: dict[tuple[str, int], None] = {}
    for line in log.read_text().splitlines():
        match = _CALL.match(line)
        if match is None or "resumed>" in line:
            continue
        thread, call, arguments = match.groups()
        counts[thread, call] = counts.get((thread, call), 0) + 1
        if str(world.place) in arguments or str(world.family) in arguments:
            found[call, counts[thread, call]] = None
    return list(found)


def faults_of(world: World, case: Case, old: Content) -> list[Fault]:
    """Every fault of every call."""
    calls = calls_of(world, case, old)
    written = max((nth for call, nth in calls if call == "pwrite64"), default=0)
    assert {"openat", "pwrite64", "fsync", "unlink"} <= {call for call, _ in calls}
    assert written > 3
    return [Fault(call, nth, kind, forever) for call, nth in calls for kind, forever in kinds(call)]


def inject(
    world: World, case: Case, old: Content, fault: Fault, *, broken: str = "", again: bool = True
) -> tuple[bool, list[str]]:
    """Whether the fault struck, and what the run, and with ``again`` the next one, violated."""
    target = world.fresh(case, old)
    log = world.scratch / "fault.log"
    if fault.kind == "short":
        run = world.program.start(case.command(target), cwd=world.family, short=fault.nth, broken=broken)
        ended = run.wait()
        fired = run.fired
    else:
        run, ended = trace(world, case, target, log, "-e", fault.injection(), broken=broken)
        fired = ended.killed if fault.kind == "KILL" else "(INJECTED)" in log.read_text()
    violated = world.judge(case, target, old, ended)
    # What could not be removed or unlocked because that very call failed is for the next run.
    if fault.call in ("unlink", "rmdir", "close", "openat") or (fault.call == "fsync" and "in place" in ended.err):
        violated = [text for text in violated if not text.startswith(("left behind", "the lock file"))]
    return fired, violated + (world.judge_next(case, target) if again else [])


def sweep(world: World, *, count: int, seed: int = 1, broken: str = "", again: float = 1.0) -> Tally:
    """Inject ``count`` of all faults of all commands, drawn without repetition while there are others.

    ``again`` is the share of them that is followed by an undisturbed run.
    """
    tally = Tally("1", "system calls of real commands fail")
    work = []
    for case in world.cases.values():
        for old in (None, case.old):
            work += [(case, old, fault) for fault in faults_of(world, case, old)]
    draw = random.Random(seed)
    draw.shuffle(work)
    for case, old, fault in (work * -(-count // len(work)))[:count]:
        if broken and tally.violations:
            break
        fired, violated = inject(world, case, old, fault, broken=broken, again=not broken and draw.random() < again)
        where = f"{case.name}, {'new' if old is None else 'replacing'}, {fault}"
        tally.note(fault.kind + (" on" if fault.forever else ""), fired, violated, where)
    return tally
