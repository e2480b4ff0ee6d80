"""Row 10: a run that is killed and resumed makes the bytes of one that was not, and a stage that was tampered with is redone."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.checkpoint.faults import Content, beside, content_of
from tests.faults.kills import lengths, start, strike
from tests.faults.tally import Tally
from tests.faults.warm import Ended, Run
from tests.faults.world import Case, World

INTERVAL = 30_000
"""Bytes between entries of a journal here: every tensor but the small ones."""
RESUMABLE = ("merge", "folder")
FATAL = (signal.SIGKILL, signal.SIGKILL, signal.SIGINT)


def journal_of(target: Path) -> Path | None:
    """The journal that a killed run left."""
    return next(iter(target.parent.glob(".*.mergetool-*.journal")), None)


def finished(target: Path) -> int:
    """How many tensors a killed run had finished."""
    journal = journal_of(target)
    try:
        return max(0, journal.read_bytes().count(b"\n") - 1) if journal else 0
    except FileNotFoundError:  # a run that goes on has just published
        return 0


def strike_with_something_kept(run: Run, target: Path, length: float, draw: random.Random) -> None:
    """Let a run go and end it some time after its first tensors are in the journal."""
    run.go()
    while not finished(target) and run.wait_for(0) is None:
        pass
    time.sleep(draw.uniform(0, 0.1 * length))
    run.kill(draw.choice(FATAL))


def kill_and_resume(world: World, *, count: int, seed: int = 10, broken: str = "", at: int = 0) -> Tally:
    """Runs with ``--resume`` are killed, up to three times one after the other, then finished: ``count`` resumed journals."""
    tally = Tally("10", "killed and resumed: the same bytes", random=True)
    draw = random.Random(seed)
    took = lengths(world)
    while tally.fired < count and not (broken and tally.violations):
        case = world.cases[draw.choice(RESUMABLE)]
        old = draw.choice((None, case.old))
        target = world.fresh(case, old)
        where = f"{case.name}, {'new' if old is None else 'replacing'}, run {tally.injected} of seed {seed}"
        had, before = 0, []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            there = content_of(target)  # a run before may have been killed just after it published
            run = start(world, case, target, "--resume", interval=INTERVAL, broken=broken)
            if draw.random() < 0.75:
                strike_with_something_kept(run, target, took[case.name], draw)
            else:
                strike(world, run, target, took[case.name], draw, draw.choice(FATAL))
            ended = run.wait()
            before += judge_left(world, case, target, there, ended)
            if ended.code == 0:
                break
            had = finished(target)
        violated = before + judge_resumed(world, case, target, broken=broken)
        tally.note(f"{min(had, 2)}{'+' if had > 1 else ''} tensors kept", had > 0, violated, where)
    return tally


def judge_left(world: World, case: Case, target: Path, old: Content, ended: Ended) -> list[str]:
    """What a run with --resume that ended violates: as any other, but that it may leave one stage and say so."""
    found = world.judge(case, target, old, ended)
    if "are kept" in ended.err:
        found = [text for text in found if not text.startswith("left behind")]
        if len(beside(target)[0]) != 1:
            found.append("nothing is kept")
    return found


def judge_resumed(world: World, case: Case, target: Path, *, broken: str = "") -> list[str]:
    """What the run that goes on violates."""
    ended = world.run(case, target, "--resume", interval=INTERVAL, broken=broken)
    if ended.code:
        return [f"the resumed run failed: {ended.code} {ended.err}"]
    found = world.judge(case, target, case.new, ended)
    if any(path.is_symlink() for path in beside(target)[0]):  # somebody's: it is neither followed nor removed
        found = [text for text in found if not text.startswith("left behind")]
    return [f"resumed: {text}" for text in found]


# ---- stages that are not what they were


def interrupted(world: World, case: Case, old: Content, draw: random.Random) -> Path:
    """The target of a run that was killed with something in its journal."""
    took = 0.04
    while True:
        target = world.fresh(case, old)
        run = start(world, case, target, "--resume", interval=INTERVAL)
        strike_with_something_kept(run, target, took, draw)
        # After publishing, the stage is what is left of the old output, of which the journal says nothing.
        if run.wait().killed and finished(target) and content_of(target) == old:
            return target


def _stage(target: Path) -> Path:
    (stage,) = beside(target)[0]
    return stage


def _files(stage: Path) -> list[Path]:
    return sorted(stage.glob("*.safetensors")) if stage.is_dir() else [stage]


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ (1 << bit)]))


def flip_data(target: Path, draw: random.Random) -> None:
    """One bit of a finished tensor."""
    journal = journal_of(target)
    assert journal is not None
    entry = json.loads(draw.choice(journal.read_text().splitlines()[1:]))
    stage = _stage(target)
    path = stage / entry["file"] if entry["file"] else stage
    _flip(path, entry["offset"] + draw.randrange(entry["length"]), draw.randrange(8))


def flip_journal(target: Path, draw: random.Random) -> None:
    """One bit of the journal."""
    journal = journal_of(target)
    assert journal is not None
    _flip(journal, draw.randrange(journal.stat().st_size), draw.randrange(8))


def cut_journal(target: Path, draw: random.Random) -> None:
    """The journal ends earlier."""
    journal = journal_of(target)
    assert journal is not None
    os.truncate(journal, draw.randrange(journal.stat().st_size))


def cut_stage(target: Path, draw: random.Random) -> None:
    """A staged file is shorter."""
    path = draw.choice(_files(_stage(target)))
    os.truncate(path, draw.randrange(path.stat().st_size))


def link_stage(target: Path, draw: random.Random) -> None:
    """A staged file is another name of a file elsewhere."""
    path = draw.choice(_files(_stage(target)))
    other = target.parent / "elsewhere"
    path.rename(other)
    if draw.random() < 0.5:
        os.link(other, path)
    else:
        path.symlink_to(other)


def others_stage(target: Path, draw: random.Random) -> None:
    """The stage is another user's."""
    path = draw.choice(_files(_stage(target)))
    os.chown(path, 65534, -1)


def swap_entries(target: Path, draw: random.Random) -> None:
    """Two tensors' digests are exchanged, or one speaks of another place."""
    journal = journal_of(target)
    assert journal is not None
    first, *lines = journal.read_text().splitlines()
    fields = [json.loads(line) for line in lines]
    one = draw.choice(fields)
    one["offset"] += draw.choice((-8, 8, 4096))
    journal.write_text("\n".join([first, *map(json.dumps, fields)]) + "\n")


def other_recipe(target: Path, draw: random.Random) -> None:
    """The journal is of another recipe, inputs, versions or way with NaN."""
    journal = journal_of(target)
    assert journal is not None
    first, *lines = journal.read_text().splitlines()
    work = json.loads(first)
    work[draw.choice(sorted(work))] = "0" * 64
    journal.write_text("\n".join([json.dumps(work), *lines]) + "\n")


TAMPERINGS: dict[str, Callable[[Path, random.Random], None]] = {
    "bit of the data": flip_data,
    "bit of the journal": flip_journal,
    "cut journal": cut_journal,
    "cut stage": cut_stage,
    "linked stage": link_stage,
    "another user's stage": others_stage,
    "other places": swap_entries,
    "other work": other_recipe,
}


def tamper(world: World, *, count: int, seed: int = 11, broken: str = "") -> Tally:
    """Stages are tampered with before they are resumed: the output is right all the same."""
    tally = Tally("10", "stages tampered with before they are resumed")
    draw = random.Random(seed)
    kinds = list(TAMPERINGS)
    for number in range(count):
        if broken and tally.violations:
            break
        kind = kinds[number % len(kinds)]
        case = world.cases[draw.choice(RESUMABLE)]
        old = draw.choice((None, case.old))
        target = interrupted(world, case, old, draw)
        TAMPERINGS[kind](target, draw)
        violated = judge_resumed(world, case, target, broken=broken)
        tally.note(kind, True, violated, f"{case.name}, {kind}, {number} of seed {seed}")
    return tally
