"""Write one file of a checkpoint, and keep a journal of all of them."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mergetool.checkpoint import journal, system
from mergetool.checkpoint.files import StagedFile, StagedFolder
from mergetool.checkpoint.header import Header, TensorInfo
from mergetool.checkpoint.journal import Entry, Journal, RunDigest
from mergetool.checkpoint.output_file import OutputFile

# Finished blocks of this size go to the disk while later ones are computed. 2 GiB onto ext4 on a virtual disk,
# 2 cores, median of 6: 0.69 s until published with it, 1.44 s without (0.83 s and 1.68 s when the blocks are
# not reserved first).
FLUSH_BLOCK = 8 << 20


class PlacedFile:
    """A safetensors file in the making: it places tensors and writes complete blocks back.

    Write-back only starts; nobody waits for it.
    """

    def __init__(self, out: OutputFile | StagedFile, header: Header, encoded: bytes) -> None:
        self.header = header
        self._out = out
        self._encoded = encoded
        self._lock = threading.Lock()
        self._filled: dict[int, int] = {}

    def write(self, info: TensorInfo, start: int, data: memoryview) -> None:
        offset = self.place(info) + start
        self._out.write(offset, data)
        for block in self._completed(offset, offset + len(data)):
            self._out.flush_behind(block, FLUSH_BLOCK)

    def write_header(self) -> None:
        self._out.write(0, memoryview(self._encoded))

    @property
    def file(self) -> OutputFile:
        """The file itself."""
        return self._out if isinstance(self._out, OutputFile) else self._out.file

    @property
    def name(self) -> str:
        """The name of its file in the output, for a journal."""
        return self._out.path.name if isinstance(self._out, OutputFile) else ""

    def place(self, info: TensorInfo) -> int:
        """The offset of a tensor's first byte."""
        return self.header.data_start + info.begin

    def entry(self, tensor: str, digest: str) -> Entry:
        """The journal's entry for a tensor."""
        info = self.header.tensors[tensor]
        return Entry(tensor, self.name, self.place(info), info.nbytes, digest)

    def _completed(self, begin: int, end: int) -> list[int]:
        """Offsets of the blocks that the bytes [begin, end) were the last to fill."""
        completed = []
        with self._lock:
            for block in range(begin - begin % FLUSH_BLOCK, end, FLUSH_BLOCK):
                share = min(end, block + FLUSH_BLOCK) - max(begin, block)
                filled = self._filled.pop(block, 0) + share
                if filled == FLUSH_BLOCK:
                    completed.append(block)
                else:
                    self._filled[block] = filled
        return completed


class JournalKeeper:
    """Keeps the journal of an output that can be resumed. ``work`` is what its bytes depend on.

    ``refused`` says why an interrupted stage was not gone on with, ``left`` how many bytes of finished tensors were left.
    """

    def __init__(self, work: RunDigest) -> None:
        self.refused: str | None = None
        self.left = 0
        self._work = work
        self._lock = threading.Lock()
        self._appending = threading.Lock()
        self._journal: Journal | None = None
        self._home: Mapping[str, PlacedFile] = {}
        self._counts: dict[str, int] = {}
        self._finished: list[str] = []
        self._pending = 0
        self._entries: dict[str, Entry] = {}

    def accepts(self, stage: Path) -> bool:
        """Whether a stage is of the same work."""
        self.refused = journal.differs(stage, self._work)
        return self.refused is None

    def begin(self, staged: StagedFile | StagedFolder, home: Mapping[str, PlacedFile]) -> frozenset[str]:
        """Read an interrupted run's tensors again, and begin a new journal. Returns the names of sound ones."""
        self._home = home
        self._target = staged.target
        with system.explained(staged.target, "reading what was left"):
            for entry in journal.entries(staged.path) if staged.resumed else ():
                file = home.get(entry.tensor)
                if (
                    file is not None
                    and entry == file.entry(entry.tensor, entry.digest)
                    and entry.tensor not in self._entries
                ) and journal.holds(file.file, entry):
                    self._entries[entry.tensor] = entry
        with system.explained(staged.target, "keeping a journal"):
            self._journal = Journal(staged.path, self._work)
        return frozenset(self._entries)

    def keep(self, names: Collection[str]) -> None:
        """Go on from these tensors."""
        assert self._journal is not None
        with system.explained(self._target, "keeping a journal"):
            self._journal.append([self._entries[name] for name in names])
        self.left += sum(self._entries[name].length for name in names)

    def wrote(self, name: str, size: int) -> None:
        """Note that bytes of a tensor were written. Now and then it syncs finished tensors and writes them down."""
        nbytes = self._home[name].header.tensors[name].nbytes
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + size
            if self._counts[name] == nbytes:
                self._finished.append(name)
                self._pending += nbytes
            if self._pending < journal.INTERVAL:
                return
            names, self._finished, self._pending = self._finished, [], 0
        with self._appending:
            self._append(names)

    def _append(self, names: Sequence[str]) -> None:
        homes = [self._home[name] for name in names]
        for file in {id(home): home for home in homes}.values():
            file.file.sync()
        entries = []
        for name, home in zip(names, homes, strict=True):
            info = home.header.tensors[name]
            entries.append(home.entry(name, home.file.digest(home.place(info), info.nbytes)))
        if self._journal is not None:
            with system.explained(self._target, "keeping a journal"):
                self._journal.append(entries)
            self.left += sum(entry.length for entry in entries)

    def leave(self) -> bool:
        """Close the journal, and leave it if it speaks of a finished tensor.

        Else it returns False, as it does after a first call.
        """
        kept, self._journal = self._journal, None
        if kept is not None and self.left:
            kept.close()
            return True
        if kept is not None:
            kept.remove()
        return False

    def end(self) -> None:
        """Remove the journal of an output that is published, or whose stage no longer exists. Nothing after `leave`."""
        kept, self._journal = self._journal, None
        if kept is not None:
            kept.remove()
            self.left = 0
