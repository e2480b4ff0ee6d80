"""Rows 8 and 9: inputs that change while they are read, and inputs that cannot be mapped."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.checkpoint.faults import content_of, violations
from tests.faults.calls import trace
from tests.faults.kills import lengths, sleep_until_staged, start
from tests.faults.tally import Tally
from tests.faults.world import World

REFUSALS = ("ENODEV", "ENOMEM", "EACCES", "EPERM", "EAGAIN")
MAPPED = ("merge", "folder", "convert")
"""Commands that read through a mapping where they can."""


def cut_short(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def edit(path: Path, draw: random.Random) -> None:
    """Some bytes in the middle become others, finite ones."""
    with path.open("r+b", buffering=0) as file:
        file.seek(draw.randrange(1000, path.stat().st_size - 5000) // 4 * 4)
        file.write(b"\0\0\x80\x3f" * 1000)


def rename_over(path: Path, draw: random.Random) -> None:
    other = path.with_name("other")
    shutil.copyfile(path, other)
    edit(other, draw)
    other.replace(path)


def touch(path: Path, draw: random.Random) -> None:
    os.utime(path, (1, draw.randrange(1 << 30)))


def lengthen(path: Path, draw: random.Random) -> None:
    with path.open("ab") as file:
        file.write(draw.randbytes(100))


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut short": cut_short,
    "edited": edit,
    "renamed over": rename_over,
    "touched": touch,
    "lengthened": lengthen,
    "removed": remove,
}


def change(world: World, *, count: int, seed: int = 8, broken: str = "") -> Tally:
    """Inputs change until ``count`` runs were struck: an output is of the old bytes or of the new ones, never of both."""
    tally = Tally("8", "inputs change while they are read", random=True)
    draw = random.Random(seed)
    took = lengths(world)
    whole = {path: path.read_bytes() for path in world.inputs}
    kinds = list(CHANGES)
    while tally.fired < count and not (broken and tally.violations):
        kind = kinds[tally.injected % len(kinds)]
        name = draw.choice(("merge", "diff"))
        case = world.cases[name]
        reader = draw.choice(("mmap", "pread"))
        old = draw.choice((None, case.old))
        target = world.fresh(case, old)
        victim = world.family / draw.choice(("alk.safetensors", "a.safetensors"))
        run = start(world, case, target, "--reader", reader, broken=broken)
        run.go()
        if draw.random() < 0.5:
            sleep_until_staged(world, run, target)
            time.sleep(draw.uniform(0, 0.3 * took[name]))
        else:
            time.sleep(draw.uniform(0, took[name]))
        CHANGES[kind](victim, draw)
        struck = run.wait_for(0) is None
        ended = run.wait()
        found = content_of(target)
        done, clean = ended.code == 0, ended.code > 0
        new = case.new
        if (
            done and found != new and not broken
        ):  # the change came before the opening: all of the output is of the new bytes
            again = world.run(case, target)
            new = content_of(target) if again.code == 0 else None
        violated = [] if found in (old, new) else ["the output is of old and new bytes"]
        if ended.killed and not (ended.code == -signal.SIGBUS and reader == "mmap" and kind == "cut short"):
            violated.append(f"ended with {ended.code}")
        put_back(whole)
        if not done:
            errors = ended.err if clean else None
            violated += violations(target, old, new, killed=ended.killed, failed=clean, errors=errors)
        tally.note(kind, struck, violated, f"{name}, {kind}, {reader}, run {tally.injected} of seed {seed}")
    world.inputs.update({path: (path.read_bytes(), path.stat().st_mtime_ns) for path in world.inputs})
    return tally


def put_back(whole: dict[Path, bytes]) -> None:
    """Write the inputs anew, where they differ."""
    for path, data in whole.items():
        if not path.exists() or path.read_bytes() != data:
            path.unlink(missing_ok=True)
            path.write_bytes(data)


def unmapped(world: World, *, count: int, seed: int = 9) -> Tally:
    """The system refuses to map the inputs: the bytes are those of the mapping."""
    tally = Tally("9", "inputs cannot be mapped")
    draw = random.Random(seed)
    names = [name for name in MAPPED if name in world.cases]
    log = world.scratch / "mmap.log"
    for number in range(count):
        case = world.cases[names[number % len(names)]]
        refusal = draw.choice(REFUSALS)
        target = world.fresh(case, None)
        paths = [word for path in world.inputs for word in ("-P", str(path))]
        _, ended = trace(world, case, target, log, "-e", "trace=mmap", *paths, "-e", f"inject=mmap:error={refusal}")
        violated = world.judge(case, target, None, ended)
        if ended.code:
            violated.append(f"exit code {ended.code}: {ended.err}")
        tally.note(refusal, "(INJECTED)" in log.read_text(), violated, f"{case.name}, {refusal}")
    return tally
