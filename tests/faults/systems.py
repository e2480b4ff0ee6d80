"""Rows 32 and 33: systems that ignore case, and Windows, as a disk in memory imitates them. Nothing here ran on either."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

from mergetool.checkpoint.files import StagedFolder, write_file
from mergetool.checkpoint.shards import ShardIndex
from mergetool.errors import OutputError, ShardIndexError
from tests.checkpoint.faults import violations
from tests.faults.disk import Disk, Kind, installed
from tests.faults.doubles import Replay, judge, replays, run, singles, sound
from tests.faults.tally import Tally
from tests.faults.world import World

SAME = (
    *(
        "A",
        "ä",
        "ß",
        "İstanbul",
        "Model-00001",
        "ﬁle",
        "Ǆ",
        "Ω",
        "é",
        "MiXeD",
        "ŉ",
        "ς",
        "K",
        "Å",
        "x̌",
        "Ñandú",
        "ÉCOLE",
        "ЖУК",
    ),
    *("straße", "Łódź", "ệ", "q̣̇", "ΑΒΓ", "ǆ", "ﬃ", "Ẁ", "Å", "ŏ", "CON1", "z-Image"),
)
DIFFERENT = (
    ("a", "b"),
    ("é", "e"),
    ("model-1", "model_1"),
    ("o", "0"),
    ("ae", "æ"),
    ("i", "ı"),
    ("l", "1"),
    ("ο", "o"),
)


def pairs() -> list[tuple[str, str, bool]]:
    """Two names, and whether some system takes them for one."""
    found = []
    for name in SAME:
        for other in (
            name.upper(),
            name.lower(),
            name.swapcase(),
            unicodedata.normalize("NFD", name),
            unicodedata.normalize("NFD", name.casefold()),
        ):
            folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", other).casefold())
            if other != name and folded == unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()):
                found.append((name, other, True))
    found += [(one, other, False) for one, other in DIFFERENT]
    return found


def caseless(root: Path) -> Tally:
    """Pairs of names in an index and in an output folder, and outputs whose name is there in another case."""
    tally = Tally("32", "names that some systems take for one (double)")
    disk = Disk(root, rules="caseless")
    for one, other, same in dict.fromkeys(pairs()):
        names = [f"{name}.safetensors" for name in (one, other)]
        violated = []
        if _index_refuses(names) != same:
            violated.append(f"an index with {names} is {'accepted' if same else 'refused'}")
        if _folder_refuses(disk, names) != same:
            violated.append(f"a folder with {names} is {'made' if same else 'refused'}")
        if same:
            violated += _replaces(disk, names)
        tally.note("one file" if same else "two files", True, violated, f"{one!r} and {other!r}")
    return tally


def _index_refuses(names: list[str]) -> bool:
    index = {"metadata": {}, "weight_map": {f"tensor {i}": name for i, name in enumerate(names)}}
    try:
        ShardIndex.parse(json.dumps(index).encode(), source="index")
    except ShardIndexError:
        return True
    return False


def _folder_refuses(disk: Disk, names: list[str]) -> bool:
    disk.clear()
    disk.plan({})
    with installed(disk), StagedFolder.create(disk.root / "out", 2) as staged:
        try:
            for name in names:
                staged.add(name, 1).write(0, memoryview(b"x"))
        except ValueError:
            return True
        except OutputError:  # only this disk knew, and too late
            return False
        staged.publish()
    return False


def _replaces(disk: Disk, names: list[str]) -> list[str]:
    """A file whose name is there in another case is an old output: not replaced unasked, and one file afterwards."""
    old, new = names
    disk.clear()
    disk.put(old, b"old")
    disk.plan({})
    with installed(disk):
        try:
            write_file(disk.root / new, b"new")
            return [f"{old} was replaced by {new} unasked"]
        except OutputError:
            pass
        write_file(disk.root / new, b"new", overwrite=True)
    content, left = disk.look(disk.root / old)
    return [] if (content, left) == (b"new", [old]) else [f"{left} after {old} was replaced by {new}"]


def windows(world: World, root: Path, *, seed: int = 33) -> Tally:
    """Every command under Windows' rules: nothing open is renamed or removed, no locks, no exchange; and every call failing."""
    tally = Tally("33", "Windows' rules (double)")
    draw = random.Random(seed)
    disk = Disk(root, rules="windows")
    with installed(disk):
        for replay in replays(world):
            if replay.resumes:
                continue
            disk.clear()
            disk.put(replay.target, replay.old)
            disk.plan({})
            if isinstance(replay.old, dict):  # no step swaps two folders there
                ended, said = run(disk, replay)
                violated = judge(disk, replay, None, ended, said)
                if ended != "failed" or "cannot swap two folders" not in said:
                    violated.append(f"{ended}: {said}")
                tally.note("folder replaced", True, violated, replay.name)
                continue
            new, calls = sound(disk, replay)
            if replay.old is not None:
                tally.note("target is in use", True, _in_use(disk, replay), replay.name)
            for faults, forever in singles(calls):
                kinds: list[Kind] = list(faults.values())
                if kinds[0] not in ("ENOSPC", "EIO") or draw.random() < 0.5:
                    continue
                disk.clear()
                disk.put(replay.target, replay.old)
                disk.plan(faults, forever=forever)
                ended, said = run(disk, replay)
                tally.note(
                    kinds[0], bool(disk.fired), judge(disk, replay, new, ended, said), f"{replay.name}, {faults}"
                )
    return tally


def _in_use(disk: Disk, replay: Replay) -> list[str]:
    """Another program has the old output open, as ComfyUI has the model it runs."""
    disk.clear()
    disk.put(replay.target, replay.old)
    disk.plan({})
    held = disk.open_input(disk.root / replay.target)
    try:
        ended, said = run(disk, replay)
    finally:
        disk.close(held)
    found = violations(
        disk.root / replay.target, replay.old, None, failed=True, errors=f"mergetool: {said}", look=disk.look
    )
    return found + ([] if ended == "failed" and "permission was denied" in said else [f"{ended}: {said}"])
