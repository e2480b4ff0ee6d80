"""The journal beside a stage: the finished tensors of a run, for ``resume`` to go on from.

``.NAME.mergetool-RANDOM.journal`` is a line of JSON that says what the work depends on, then a line for every finished tensor,
with its place in the stage and its BLAKE2b. Lines are appended after the data they speak of was synced, about every `INTERVAL`
bytes. A journal is believed only where it speaks of the same work, and a tensor only when it is read again and has its digest.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.checkpoint import system
from mergetool.checkpoint.targets import JOURNAL, attempt, is_own

if TYPE_CHECKING:
    from mergetool.checkpoint.output_file import OutputFile

# A tensor of 12 GB models is up to 0.1 GB, and syncing and reading back 1 GiB takes a second of one thread.
INTERVAL = 1 << 30
LARGEST = 100_000_000
"""Bytes of the longest journal that is read: 300,000 tensors."""

RunDigest = Mapping[str, str]
"""Digests of the things that a run's bytes depend on, by the word for a change of each."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished tensor: its file's name, its bytes' place, and their BLAKE2b in hex."""

    tensor: str
    file: str
    offset: int
    length: int
    digest: str


def digest_of(*parts: bytes) -> str:
    """One digest of several byte strings; where one ends and the next begins counts."""
    digest = hashlib.blake2b(digest_size=32)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def place(stage: Path) -> Path:
    """The path of a stage's journal."""
    return stage.with_name(stage.name + JOURNAL)


def differs(stage: Path, work: RunDigest) -> str | None:
    """Say why ``work`` cannot go on with ``stage``; None when it can."""
    try:
        lines = _lines(place(stage))
        recorded = json.loads(lines[0])
    except (OSError, ValueError, IndexError):
        return "its journal is damaged"
    if not isinstance(recorded, dict):
        return "its journal is damaged"
    other = [name for name in work if recorded.get(name) != work[name]]
    return f"it was of {' and '.join(other)}" if other else None


def entries(stage: Path) -> list[Entry]:
    """The finished tensors of a journal, up to its first damaged line. The last line may have been cut."""
    finished = []
    for line in _lines(place(stage))[1:]:
        try:
            fields = json.loads(line)
            entry = Entry(**fields)
        except (ValueError, TypeError):
            break
        if not all(isinstance(getattr(entry, name), kind) for name, kind in _FIELDS.items()):
            break
        finished.append(entry)
    return finished


_FIELDS = {"tensor": str, "file": str, "offset": int, "length": int, "digest": str}


def holds(file: OutputFile, entry: Entry) -> bool:
    """Whether the stage still holds a tensor's bytes. They are read again and have to have the digest."""
    return file.digest(entry.offset, entry.length) == entry.digest


class Journal:
    """A journal being written; every method may raise OSError."""

    def __init__(self, stage: Path, work: RunDigest, kept: Iterable[Entry] = ()) -> None:
        """Begin a new journal of ``stage`` in the place of an old one, with its ``kept`` entries."""
        self.path = place(stage)
        self.count = 0
        self._end = 0
        attempt(system.unlink, self.path)
        self._fd = system.open_new(self.path)
        try:
            self._write([dict(work)])
            self.append(kept)
        except BaseException:
            self.remove()
            raise

    def append(self, finished: Iterable[Entry]) -> None:
        """Add tensors whose bytes are on stable storage; on stable storage when the call returns."""
        fields = [asdict(entry) for entry in finished]
        self._write(fields)
        system.fsync(self._fd)
        self.count += len(fields)

    def _write(self, objects: Iterable[Mapping[str, Any]]) -> None:
        data = memoryview("".join(json.dumps(fields) + "\n" for fields in objects).encode())
        while data:
            count = system.write_at(self._fd, data, self._end)
            self._end += count
            data = data[count:]
            if not count:
                raise OSError(0, "the system wrote no bytes")

    def close(self) -> None:
        """Leave it for a later run. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            attempt(system.close, fd)

    def remove(self) -> None:
        """Delete it. Idempotent, never raises."""
        try:
            system.unlink(self.path)
        except OSError:  # Windows removes no open file
            self.close()
            attempt(system.unlink, self.path)
        else:
            self.close()


def _lines(path: Path) -> list[bytes]:
    """The lines of a regular file of this user's; raises OSError for anything else, ValueError for one that is too long."""
    fd = system.open_input(path)
    try:
        status = system.status_of(fd)
        if not stat.S_ISREG(status.st_mode) or not is_own(status) or status.st_size > LARGEST:
            raise ValueError("not a journal of this user's")
        buffer = bytearray(status.st_size)
        done = 0
        while done < len(buffer):
            count = system.read_at(fd, memoryview(buffer)[done:], done)
            if count == 0:
                raise ValueError("it shrank")
            done += count
    finally:
        system.close(fd)
    *lines, _cut = bytes(buffer).split(b"\n")
    return lines
