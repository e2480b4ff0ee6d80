"""Row 21: links, and files that are no files. Models may be linked from anywhere, somebody's settings may not pass for a config; each judged by an alarm, so that nothing can wait for ever."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError, HeaderError, InputMissing, MergetoolError, ShardIndexError
from tests.hostile.tally import Tally
from tests.patience import HANG

Verdict = type[MergetoolError] | None


class Waits(BaseException):
    """Opening took too long. No TimeoutError: that is an OSError, which the program would take for the disk's word."""


@dataclass(frozen=True)
class Case:
    """What lies where a model is looked for, the path that is opened, and the verdict: an error's class, None for opened."""

    name: str
    make: Callable[[Path], Path]
    verdict: Verdict

    def fault(self, folder: Path) -> str | None:
        """What was wrong when it was opened in ``folder``: another verdict, waiting, or a file left open."""
        path = self.make(folder)
        before = os.listdir("/proc/self/fd")
        try:
            verdict = opened_without_waiting(path)
        except Waits:
            return "waits"
        if verdict is not self.verdict:
            return verdict.__name__ if verdict else "opened"
        return None if os.listdir("/proc/self/fd") == before else "left open"


def _model(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.ones(2)}, path)
    return path


def _linked(folder: Path, target: str | Path, name: str = "model.safetensors") -> Path:
    """A folder whose model is a link to ``target``."""
    place = folder / "place"
    place.mkdir(exist_ok=True)
    (place / name).symlink_to(target)
    return place


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _bound(folder: Path) -> Path:
    before = Path.cwd()
    os.chdir(folder)  # a socket's path may have 108 bytes only
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("m")
    finally:
        os.chdir(before)
    return folder / "m"


def _node(path: Path, major: int, minor: int) -> Path:
    os.mknod(path, 0o600 | 0o020000, os.makedev(major, minor))
    return path


def _snapshot(folder: Path, target: Callable[[Path], Path]) -> Path:
    """A model in a Hugging Face cache: ``models--a--b/snapshots/REVISION``, its file a link to what ``target`` makes in the cache."""
    revision = folder / "models--a--b" / "snapshots" / "0123"
    revision.mkdir(parents=True)
    (revision / "model.safetensors").symlink_to(target(folder / "models--a--b"))
    return revision


def _chain(folder: Path, length: int) -> Path:
    place = folder / "place"
    place.mkdir()
    _model(place / "0.bin")
    for number in range(length):
        (place / f"{number + 1}.bin").symlink_to(f"{number}.bin")
    (place / "model.safetensors").symlink_to(f"{length}.bin")
    return place


def _through_a_link(folder: Path) -> Path:
    """The blobs of a cache are a link to another folder."""
    secret = _model(folder / "secret" / "digest")
    revision = _snapshot(folder, lambda cache: cache / "blobs" / "digest")
    (folder / "models--a--b" / "blobs").symlink_to(secret.parent)
    return revision


def _linked_part(folder: Path) -> Path:
    pipeline = folder / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "transformer").symlink_to(_model(folder / "far" / "model.safetensors").parent)
    return pipeline


CASES = [
    Case("a file", lambda f: _model(f / "m.safetensors"), None),
    Case("a link that the user names", lambda f: _link(f / "l", _model(f / "far" / "m")), None),
    Case("a link inside its folder", lambda f: _linked(f, _model(f / "place" / "m.bin").name), None),
    Case("ten links inside the folder", lambda f: _chain(f, 10), None),
    Case("more links than the system follows", lambda f: _chain(f, 60), InputMissing),
    Case("a cache's blob", lambda f: _snapshot(f, lambda c: _model(c / "blobs" / "digest")), None),
    Case("another cache's blob", lambda f: _snapshot(f, lambda c: _model(c.parent / "models--c--d" / "blobs" / "x")), None),
    Case("a cache's refs", lambda f: _snapshot(f, lambda c: _model(c / "refs" / "main")), None),
    Case("a folder below the blobs", lambda f: _snapshot(f, lambda c: _model(c / "blobs" / "x" / "y")), None),
    Case("blobs that are a link out", _through_a_link, None),
    Case("a link up", lambda f: _linked(f, Path("..") / _model(f / "m.safetensors").name), None),
    Case("a link to an absolute path", lambda f: _linked(f, _model(f / "m.safetensors")), None),
    Case("a link to /etc/passwd", lambda f: _linked(f, "/etc/passwd"), HeaderError),
    Case("a link to /proc/self/environ", lambda f: _linked(f, "/proc/self/environ"), HeaderError),
    Case("a link to /dev/zero", lambda f: _linked(f, "/dev/zero"), DataError),
    Case("a link to /dev/stdin", lambda f: _linked(f, "/dev/stdin"), DataError),
    Case("a link to nothing", lambda f: _linked(f, "nothing"), InputMissing),
    Case("a link to itself", lambda f: _linked(f, "model.safetensors"), InputMissing),
    Case("a link to its own folder", lambda f: _linked(f, "."), InputMissing),
    Case("an index that is a link out", lambda f: _linked(f, _model(f / "x.json"), "m.safetensors.index.json"), ShardIndexError),
    Case("a config that links to no JSON", lambda f: _with_config(f, b"secret"), DataError),
    Case("a config that links to somebody's settings", lambda f: _with_config(f, b'{"password": "secret"}'), DataError),
    Case("a config that links to a model's", lambda f: _with_config(f, b'{"_class_name": "Flux"}'), None),
    Case("a pipeline's part that is a link", _linked_part, None),
    Case("a FIFO", lambda f: _fifo(f / "m.safetensors"), DataError),
    Case("a link to a FIFO", lambda f: _linked(f, _fifo(f / "pipe")), DataError),
    Case("a FIFO in the place of a folder's model", lambda f: _fifo(f / "model.safetensors").parent, DataError),
    Case("a socket", _bound, DataError),
    Case("a character device", lambda f: _node(f / "m.safetensors", 1, 5), DataError),
    Case("a terminal", lambda f: _link(f / "l", Path("/dev/tty")), DataError),
    Case("a folder called .safetensors", lambda f: _made(f / "m.safetensors"), InputMissing),
    Case("an empty file", lambda f: _empty(f / "m.safetensors"), HeaderError),
    Case("a path through a file", lambda f: _model(f / "m.safetensors") / "x", InputMissing),
]  # fmt: skip


def _link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


def _with_config(folder: Path, content: bytes) -> Path:
    place = _model(folder / "place" / "model.safetensors").parent
    (folder / "config.json").write_bytes(content)
    (place / "config.json").symlink_to("../config.json")
    return place


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def _empty(path: Path) -> Path:
    path.touch()
    return path


def run(folder: Path) -> Tally:
    """Every case in a folder of its own."""
    tally = Tally("21", "links that lead out, and files that are no files", injected=len(CASES))
    for number, case in enumerate(CASES):
        place = folder / str(number)
        place.mkdir()
        fault = case.fault(place)
        tally.judge(None if fault is None else f"{case.name}: {fault}")
    return tally


def opened_without_waiting(path: Path) -> Verdict:
    """What opening does; raises Waits when it has not ended after minutes."""

    def late(number: int, frame: object) -> None:
        raise Waits(path)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG)
    try:
        with Checkpoint.open(path):
            return None
    except MergetoolError as error:
        return type(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
