"""Rows 3 and 5: SIGKILL, and signals that can be answered, at random moments of real runs."""

from __future__ import annotations

import os
import random
import signal
import statistics
import time
from pathlib import Path

from tests.checkpoint.faults import beside
from tests.faults.tally import Tally
from tests.faults.warm import Run
from tests.faults.world import Case, World

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def lengths(world: World) -> dict[str, float]:
    """Seconds that each command takes from its gate to its end, a median of five."""
    found = {}
    for case in world.cases.values():
        seconds = []
        for _ in range(5):
            run = start(world, case, world.fresh(case, None))
            begin = time.monotonic()
            run.go()
            assert run.wait().code == 0
            seconds.append(time.monotonic() - begin)
        found[case.name] = statistics.median(seconds)
    return found


def start(world: World, case: Case, target: Path, *more: object, **how: object) -> Run:
    """A run that stands at its gate."""
    run = world.program.start(case.command(target, *more), cwd=world.family, gated=True, **how)  # type: ignore[arg-type]
    run.at_gate()
    return run


def sleep_until_staged(world: World, run: Run, target: Path) -> None:
    """Wait until the temporary is there, or the run ended."""
    folder = str(target.parent)
    while not any(".mergetool-" in name for name in os.listdir(folder)):
        if run.wait_for(0) is not None:
            return


def strike(world: World, run: Run, target: Path, length: float, draw: random.Random, number: int) -> bool:
    """Let a run go and send it signal ``number``: a third of the time while its output is staged or published."""
    during_commit = draw.random() < 1 / 3
    delay = draw.uniform(0, 0.4 * length) if during_commit else draw.uniform(0, length)
    run.go()
    if during_commit:
        sleep_until_staged(world, run, target)
    end = time.monotonic() + delay
    while time.monotonic() < end:
        time.sleep(min(0.001, max(0.0, end - time.monotonic())))
    return run.kill(number)


def kill(world: World, *, count: int, seed: int = 3, broken: str = "", again: float = 1.0) -> Tally:
    """SIGKILL until ``count`` runs were killed before their end; a share of them, ``again``, is followed by a run that makes good."""
    tally = Tally("3", "kill -9 at a random moment", random=True)
    draw = random.Random(seed)
    took = lengths(world)
    while tally.fired < count and not (broken and tally.violations):
        case = draw.choice(list(world.cases.values()))
        old = draw.choice((None, case.old))
        target = world.fresh(case, old)
        run = start(world, case, target, broken=broken)
        strike(world, run, target, took[case.name], draw, signal.SIGKILL)
        ended = run.wait()
        violated = world.judge(case, target, old, ended)
        where = f"{case.name}, {'new' if old is None else 'replacing'}, run {tally.injected} of seed {seed}"
        kind = "while staged" if ended.killed and beside(target)[0] else "else"
        if not broken and draw.random() < again:
            violated += world.judge_next(case, target)
        tally.note(kind, ended.killed, violated, where)
    return tally


def signals(world: World, *, count: int, seed: int = 5, broken: str = "") -> Tally:
    """SIGINT, SIGTERM and SIGHUP, every sixth twice: the run ends, cleaned up, and says how it ended.

    A signal that comes when the output is published is too late: the run then ends with 0. One that the interpreter gets before
    or after the program's own `main` ends it at once.
    """
    tally = Tally("5", "signals and a closed stdout", random=True)
    draw = random.Random(seed)
    took = lengths(world)
    while tally.fired < count * 9 // 10 and not (broken and tally.violations):
        case = draw.choice(list(world.cases.values()))
        old = draw.choice((None, case.old))
        number = draw.choice(POLITE)
        twice = draw.random() < 1 / 6
        target = world.fresh(case, old)
        run = start(world, case, target, broken=broken)
        strike(world, run, target, took[case.name], draw, number)
        if twice:
            time.sleep(draw.uniform(0, 0.003))
            run.kill(number)
        ended = run.wait()
        violated = world.judge(case, target, old, ended)
        stopped = ended.code in (128 + number, -number)
        if ended.code not in (0, 128 + number) and not ended.killed:
            violated.append(f"exit code {ended.code} after signal {number}")
        name = signal.Signals(number).name + (" twice" if twice else "")
        tally.note(name, stopped, violated, f"{case.name}, {name}, run {tally.injected} of seed {seed}")
    for _ in range(count - count * 9 // 10):
        case = draw.choice(list(world.cases.values()))
        target = world.fresh(case, None)
        ended, violated = closed_stdout(world, case, target)
        tally.note("closed stdout", True, violated, case.name)
    return tally


def closed_stdout(world: World, case: Case, target: Path) -> tuple[int, list[str]]:
    """A run whose output nobody reads, as behind ``| head``: no traceback, and the output is whole."""
    pipe = world.scratch / "pipe"
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    run = start(world, case, target, out=pipe)
    os.close(reader)  # the run holds the other end: its first line is a broken pipe
    run.go()
    ended = run.wait()
    violated = world.judge(case, target, None, ended)
    if ended.code != 0 or ended.err:
        violated.append(f"exit code {ended.code}, and said {ended.err!r}")
    return ended.code, violated
