"""Row 2: every storage call of every command fails, in every way, on a disk in memory: thousands of runs a second.

What the commands ask of the storage is their outputs' layout and tensors, written in order; that is replayed here from outputs
that the real commands made.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mergetool.checkpoint import journal
from mergetool.checkpoint.header import Header, header_length
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.errors import MergetoolError, OutputError, StorageError
from tests.checkpoint.faults import Content, violations
from tests.faults import broken as wrong
from tests.faults.disk import Disk, Killed, Kind, installed
from tests.faults.tally import Tally
from tests.faults.world import World

ERRORS: tuple[Kind, ...] = ("ENOSPC", "EIO", "EINTR", "short")
ENDS: tuple[Kind, ...] = ("kill", "power")
SHARD_SIZE = 4_000


@dataclass(frozen=True)
class Replay:
    """The storage side of a command: its output's layout and bytes, and what is at the target before."""

    name: str
    target: str
    header: Header
    tensors: Mapping[str, bytes]
    extra: Mapping[str, bytes]
    old: Content
    resumes: bool = False

    def write(self, folder: Path) -> None:
        """Write the output as the command does."""
        target = folder / self.target
        with CheckpointWriter.stage(
            target,
            self.header,
            overwrite=True,
            shard_size=None if target.suffix else SHARD_SIZE,
            extra_files=self.extra,
            resume={"other inputs": "none"} if self.resumes else None,
        ) as out:
            done = out.kept
            out.keep(done)
            for name, data in self.tensors.items():
                if name not in done:
                    half = len(data) // 2
                    out.write(name, 0, memoryview(data)[:half])
                    out.write(name, half, memoryview(data)[half:])
            out.commit()


def replays(world: World) -> list[Replay]:
    """Every command, on a new and on an old output, and those that can be resumed also so."""
    found = []
    for case in world.cases.values():
        if isinstance(case.new, dict):
            files = {name: data for name, data in case.new.items() if name.endswith(".safetensors")}
            extra = {name: data for name, data in case.new.items() if name == "config.json"}
        else:
            assert isinstance(case.new, bytes)
            files, extra = {"": case.new}, {}
        tensors, entries, metadata = {}, [], {}
        for data in files.values():
            length = header_length(data[:32], file_size=len(data), source="output")
            header = Header.parse(data[: 8 + length], file_size=len(data), source="output")
            metadata = dict(header.metadata)
            for name, info in header.tensors.items():
                # A part of each is enough to be cut in the middle, and keeps the disk in memory quick.
                rows = max(1, info.shape[0] // 16)
                shape = (rows, *info.shape[1:])
                size = info.nbytes // info.shape[0] * rows
                start = header.data_start + info.begin
                tensors[name] = data[start : start + size]
                entries.append((name, info.dtype, shape))
        planned = Header.plan(entries, metadata)
        for old in (None, case.old):
            for resumes in (False, True) if case.name in ("merge", "folder") else (False,):
                name = f"{case.name}, {'new' if old is None else 'replacing'}{', resumable' if resumes else ''}"
                found.append(Replay(name, case.target, planned, tensors, extra, old, resumes))
    return found


def run(disk: Disk, replay: Replay) -> tuple[str, str]:
    """How a run ended, "done", "failed", "killed" or "crashed", and what it said."""
    try:
        replay.write(disk.root)
    except Killed:
        return "killed", ""
    except (OutputError, StorageError) as error:
        return "failed", str(error)
    except MergetoolError as error:
        return "failed", f"not of the storage: {error!r}"
    return "done", ""


def judge(disk: Disk, replay: Replay, new: Content, ended: str, said: str) -> list[str]:
    """What a run violated."""
    in_place = "is in place, but" in said
    broken = violations(
        disk.root / replay.target,
        replay.old,
        new,
        killed=ended == "killed",
        succeeded=ended == "done" or in_place,
        failed=ended == "failed" and not in_place,
        errors=f"mergetool: {said}" if ended == "failed" else None,
        look=disk.look,
    )
    calls = {call for call, _ in disk.fired}
    # Removing is the one thing that cannot be undone by removing; what a swap put aside stays until the swap is known to be
    # durable; what is to be resumed is left on purpose. The next run clears all of it.
    if calls & {"unlink", "remove_folder", "fsync_folder"} or (replay.resumes and ended == "failed"):
        broken = [text for text in broken if not text.startswith(("left behind", "the lock file"))]
    return broken


def strike(
    disk: Disk,
    replay: Replay,
    new: Content,
    faults: dict[int, Kind],
    draw: random.Random,
    *,
    forever: bool = False,
) -> tuple[bool, list[str]]:
    """Run with faults, then cut the power if that is one, then run again without."""
    disk.clear()
    disk.put(replay.target, replay.old)
    disk.plan(faults, forever=forever)
    ended, said = run(disk, replay)
    fired = len({kind for _, kind in disk.fired}) > 0 and (forever or len(disk.fired) == len(faults))
    broken = judge(disk, replay, new, ended, said)
    if "power" in faults.values() or (ended == "done" and draw.random() < 0.2):
        how = draw.choice(("nothing", "names", "any", "any"))
        succeeded = ended == "done"
        disk.power_cut(draw, how)  # type: ignore[arg-type]
        broken += [
            f"after a power cut that kept {how}: {text}"
            for text in violations(
                disk.root / replay.target, replay.old, new, killed=True, succeeded=succeeded, look=disk.look
            )
        ]
    disk.plan({})
    ended, said = run(disk, replay)
    again = violations(disk.root / replay.target, new, new, succeeded=True, look=disk.look)
    broken += [f"the run after it: {text}" for text in ([said] if ended != "done" else again)]
    return fired, broken


def sound(disk: Disk, replay: Replay) -> tuple[Content, list[str]]:
    """What an undisturbed run makes, and its calls."""
    disk.clear()
    disk.put(replay.target, replay.old)
    disk.plan({})
    ended, said = run(disk, replay)
    assert ended == "done", said
    return disk.look(disk.root / replay.target)[0], list(disk.calls)


def singles(calls: list[str]) -> Iterator[tuple[dict[int, Kind], bool]]:
    """Every fault at every call, once and from then on; a power cut several times, since what it keeps is drawn."""
    for nth, name in enumerate(calls, 1):
        for kind in ERRORS:
            if kind != "short" or name == "write_at":
                yield {nth: kind}, False
                if kind in ("ENOSPC", "EIO"):
                    yield {nth: kind}, True
        yield {nth: "kill"}, False
        for _ in range(5):
            yield {nth: "power"}, False


def sweep(world: World, root: Path, *, count: int, seed: int = 2, broken: str = "") -> Tally:
    """Every single fault, then pairs of them drawn at random, ``count`` faults in all; in another order for every seed but 1.

    ``broken`` names a wrong protocol of `tests.faults.broken`, for which the faults are drawn from all.
    """
    tally = Tally("2", "storage calls fail on a disk in memory")
    draw = random.Random(seed)
    disk = Disk(root)
    interval, journal.INTERVAL = journal.INTERVAL, 2_000
    try:
        with installed(disk):
            found = [(replay, *sound(disk, replay)) for replay in replays(world)]
        with installed(disk), wrong.for_a_while(broken) if broken else nullcontext():
            work = [(r, new, faults, forever) for r, new, calls in found for faults, forever in singles(calls)]
            if broken:
                draw.shuffle(work)
            elif seed > 1:  # all single faults are those of seed 1; others go on with pairs and other power cuts
                work = []
            for replay, new, faults, forever in itertools.chain(work, _pairs(found, draw)):
                if tally.injected >= count or (broken and tally.violations):
                    break
                fired, violated = strike(disk, replay, new, faults, draw, forever=forever)
                if not fired and len(faults) > 1:
                    continue  # the first of a pair ended the run before the second
                where = f"{replay.name}, {faults}, forever {forever}"
                for kind in faults.values():  # a pair is two faults
                    tally.note(kind + (" on" if forever else ""), fired, violated, where)
    finally:
        journal.INTERVAL = interval
    return tally


def _pairs(
    found: list[tuple[Replay, Content, list[str]]], draw: random.Random
) -> Iterator[tuple[Replay, Content, dict[int, Kind], bool]]:
    while True:
        replay, new, calls = draw.choice(found)
        one = draw.randint(1, len(calls) - 1)
        first: Kind = "short" if calls[one - 1] == "write_at" and draw.random() < 0.5 else draw.choice(ERRORS[:3])
        # After an error there are only the few calls that clean up; after a short write there are all.
        other = draw.randint(one + 1, len(calls) if first == "short" else min(one + 4, len(calls)))
        yield replay, new, {one: first, other: draw.choice(ERRORS[:3] + ENDS)}, False
