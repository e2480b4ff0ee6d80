"""Rows 7 and 34: places that cannot be written, each refused in one sentence, and who may read what was written."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.checkpoint.faults import Content, content_of
from tests.faults.tally import Tally
from tests.faults.world import World, clear, put

NOBODY = 65534
"""Root is refused nothing by a file's mode."""

Place = tuple[Path, int]
"""A target, and who runs."""


def read_only_mount(place: Path) -> Place:
    folder = place / "mounted"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=4M", "none", folder], check=True)
    return folder / "out.safetensors", 0


def read_only_mount_for_a_folder(place: Path) -> Place:
    return read_only_mount(place)[0].with_name("out"), 0


def anothers_folder(place: Path) -> Place:
    (place / "theirs").mkdir(mode=0o755)
    return place / "theirs" / "out.safetensors", NOBODY


def anothers_folder_for_shards(place: Path) -> Place:
    return anothers_folder(place)[0].with_name("out"), NOBODY


def folder_that_may_not_be_entered(place: Path) -> Place:
    (place / "closed").mkdir(mode=0o700)
    return place / "closed" / "out.safetensors", NOBODY


def folder_that_may_be_read_but_not_entered(place: Path) -> Place:
    (place / "closed").mkdir(mode=0o744)
    return place / "closed" / "out.safetensors", NOBODY


def missing_folder(place: Path) -> Place:
    return place / "missing" / "out.safetensors", 0


def missing_folders(place: Path) -> Place:
    return place / "missing" / "too" / "out.safetensors", 0


def file_as_folder(place: Path) -> Place:
    (place / "file").write_bytes(b"x")
    return place / "file" / "out.safetensors", 0


def a_folder_is_there(place: Path) -> Place:
    (place / "out.safetensors").mkdir()
    return place / "out.safetensors", 0


def a_file_is_there(place: Path) -> Place:
    (place / "out").write_bytes(b"x")
    return place / "out", 0


def a_device_is_there(place: Path) -> Place:
    os.mknod(place / "out.safetensors", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    return place / "out.safetensors", 0


def a_fifo_is_there(place: Path) -> Place:
    os.mkfifo(place / "out.safetensors")
    return place / "out.safetensors", 0


def a_socket_is_there(place: Path) -> Place:
    os.chdir(place)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("out.safetensors")
    return place / "out.safetensors", 0


def a_link_to_nothing(place: Path) -> Place:
    (place / "out.safetensors").symlink_to("nowhere")
    return place / "out.safetensors", 0


def a_link_to_itself(place: Path) -> Place:
    (place / "out.safetensors").symlink_to("out.safetensors")
    return place / "out.safetensors", 0


def a_link_to_a_folder(place: Path) -> Place:
    (place / "real").mkdir()
    (place / "out.safetensors").symlink_to("real")
    return place / "out.safetensors", 0


def a_folder_with_a_diary(place: Path) -> Place:
    put(place / "out", {"a.safetensors": b"old", "diary.txt": b"precious"})
    return place / "out", 0


def a_name_that_is_too_long(place: Path) -> Place:
    return place / ("x" * 250 + ".safetensors"), 0


def a_lock_that_is_a_link(place: Path) -> Place:
    (place / "victim").write_bytes(b"precious")
    (place / ".out.safetensors.mergetool.lock").symlink_to("victim")
    return place / "out.safetensors", 0


GOLDEN: dict[Callable[[Path], Place], tuple[int, str]] = {
    read_only_mount: (73, '"{target}": locking failed because the file system is read-only; choose another folder.'),
    read_only_mount_for_a_folder: (
        73,
        '"{target}": locking failed because the file system is read-only; choose another folder.',
    ),
    anothers_folder: (
        73,
        '"{target}": locking failed because permission was denied; check the folder\'s permissions or choose another.',
    ),
    anothers_folder_for_shards: (
        73,
        '"{target}": locking failed because permission was denied; check the folder\'s permissions or choose another.',
    ),
    folder_that_may_not_be_entered: (
        73,
        '"{target}": looking at it failed because permission was denied; check the folder\'s permissions or choose another.',
    ),
    folder_that_may_be_read_but_not_entered: (
        73,
        '"{target}": looking at it failed because permission was denied; check the folder\'s permissions or choose another.',
    ),
    missing_folder: (73, 'the folder "{folder}" does not exist; make it first.'),
    missing_folders: (73, 'the folder "{folder}" does not exist; make it first.'),
    file_as_folder: (73, '"{folder}" is not a folder; choose another place.'),
    a_folder_is_there: (
        73,
        '"{target}" is a folder; name a file in it, such as "{target}/merged.safetensors", or a new folder with "/" at its end.',
    ),
    a_file_is_there: (73, '"{target}" is a file, but the output is a folder; choose another name.'),
    a_device_is_there: (73, '"{target}" is a device, FIFO or socket; choose another name.'),
    a_fifo_is_there: (73, '"{target}" is a device, FIFO or socket; choose another name.'),
    a_socket_is_there: (73, '"{target}" is a device, FIFO or socket; choose another name.'),
    a_link_to_nothing: (73, '"{target}" is a link that leads nowhere; remove it or choose another name.'),
    a_link_to_itself: (73, '"{target}" is a link that leads nowhere; remove it or choose another name.'),
    a_link_to_a_folder: (
        73,
        '"{target}" is a folder; name a file in it, such as "{target}/merged.safetensors", or a new folder with "/" at its end.',
    ),
    a_folder_with_a_diary: (
        73,
        '"{target}" also holds "diary.txt", which is no part of a model folder; choose another folder or move that away.',
    ),
    a_name_that_is_too_long: (
        73,
        '"{target}": looking at it failed because the name is too long; choose a shorter name.',
    ),
    a_lock_that_is_a_link: (
        73,
        '"{target}": locking failed because a link is there; remove the link or choose another folder.',
    ),
}
"""Where to write -> exit code, and what is said on stderr after "mergetool: "."""


@contextlib.contextmanager
def readable(world: World) -> Iterator[None]:
    """Let another user read the inputs for the block."""
    world.family.chmod(0o755)
    for path in world.inputs:
        path.chmod(0o644)
    yield


def refuse(world: World) -> Tally:
    """Every place of `GOLDEN`: refused with its sentence, and everything there as it was."""
    tally = Tally("7", "places that cannot be written")
    with readable(world):
        for make, (code, sentence) in GOLDEN.items():
            clear(world.place)
            world.place.chmod(0o755)
            target, uid = make(world.place)
            before = everything(world.place)
            case = world.cases["folder" if target.suffix == "" else "merge"]
            try:
                ended = world.run(case, target, uid=uid)
                wanted = f"mergetool: {sentence.format(target=target, folder=target.parent)}\n"
                violated = [] if ended.err == wanted else [f"said {ended.err!r}, not {wanted!r}"]
                if ended.code != code:
                    violated.append(f"exit code {ended.code}")
                if everything(world.place) != before:
                    violated.append("something changed")
            finally:
                if (world.place / "mounted").is_mount():
                    subprocess.run(["umount", world.place / "mounted"], check=True)
            tally.note(make.__name__.replace("_", " "), True, violated)
    clear(world.place)
    return tally


def everything(folder: Path) -> dict[str, object]:
    """Whatever is below a folder: kinds, and the bytes of files."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: object = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_ino, content)
    return found


def modes(world: World, *, broken: str = "") -> Tally:
    """Umasks 022 and 077, new files and replaced ones of several modes and owners, files and folders."""
    tally = Tally("34", "permissions and ownership")
    merge, folder = world.cases["merge"], world.cases["folder"]
    cases: list[
        tuple[str, Content, int, int | None, int, int, int]
    ] = []  # target's case, old, umask, mode, owner; wanted
    for umask in (0o022, 0o077, 0o002):
        cases.append(("merge", None, umask, None, 0, 0o666 & ~umask, 0))
        cases.append(("folder", None, umask, None, 0, 0o777 & ~umask, 0))
    for mode in (0o640, 0o600, 0o664):
        cases.append(("merge", merge.old, 0o022, mode, 0, mode, 0))
    cases.append(("merge", merge.old, 0o077, 0o644, NOBODY, 0o644, NOBODY))
    cases.append(("folder", folder.old, 0o077, 0o750, 0, 0o750, 0))
    cases.append(("folder", folder.old, 0o022, 0o755, NOBODY, 0o755, NOBODY))
    for name, old, umask, mode, owner, wanted_mode, wanted_owner in cases:
        case = world.cases[name]
        target = world.fresh(case, old)
        if mode is not None:
            target.chmod(mode)
            os.chown(target, owner, owner)
        ended = world.run(case, target, umask=umask, broken=broken)
        violated = world.judge(case, target, old, ended)
        status = target.stat()
        if stat.S_IMODE(status.st_mode) != wanted_mode:
            violated.append(f"mode {stat.S_IMODE(status.st_mode):o}, not {wanted_mode:o}")
        if (status.st_uid, status.st_gid) != (wanted_owner, wanted_owner):
            violated.append(f"owner {status.st_uid}:{status.st_gid}, not {wanted_owner}")
        if content_of(target) != case.new:
            violated.append("the output is not there")
        tally.note("new" if old is None else "replaced", True, violated, f"{name}, umask {umask:o}, was {mode}")
    return tally
