"""Writing a checkpoint: every tensor in any order from any thread, then the headers, then one publishing step."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from mergetool.checkpoint import journal, shards, system
from mergetool.checkpoint.files import OutputFile, StagedFile, StagedFolder
from mergetool.checkpoint.header import Header, TensorInfo
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.journal import Entry, Journal, Work
from mergetool.checkpoint.names import quoted
from mergetool.errors import UsageError

STEM = "diffusion_pytorch_model"

# Finished blocks of this size go to the disk while later ones are computed. 2 GiB onto ext4 on a virtual disk,
# 2 cores, median of 6: 0.69 s until published with it, 1.44 s without (0.83 s and 1.68 s when the blocks are
# not reserved first).
FLUSH_BLOCK = 8 << 20


class _File:
    """One safetensors file being written: places tensors, and starts write-back of blocks that are complete."""

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
        """Which file of the output it is, for a journal."""
        return self._out.path.name if isinstance(self._out, OutputFile) else ""

    def place(self, info: TensorInfo) -> int:
        """The offset of a tensor's first byte."""
        return self.header.data_start + info.begin

    def entry(self, tensor: str, digest: str) -> Entry:
        """What a journal says of a tensor."""
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


class Progress:
    """Keeps the journal of an output that can be resumed. ``work`` is what its bytes depend on.

    ``refused`` says why an interrupted stage was not gone on with, ``left`` how many bytes of finished tensors were left.
    """

    def __init__(self, work: Work) -> None:
        self.refused: str | None = None
        self.left = 0
        self._work = work
        self._lock = threading.Lock()
        self._appending = threading.Lock()
        self._journal: Journal | None = None
        self._home: Mapping[str, _File] = {}
        self._counts: dict[str, int] = {}
        self._finished: list[str] = []
        self._pending = 0
        self._found: dict[str, Entry] = {}

    def accepts(self, stage: Path) -> bool:
        """Whether a stage is of the same work."""
        self.refused = journal.differs(stage, self._work)
        return self.refused is None

    def begin(self, staged: StagedFile | StagedFolder, home: Mapping[str, _File]) -> frozenset[str]:
        """Read again what an interrupted run had finished, and begin a new journal; the tensors that are right."""
        self._home = home
        self._target = staged.target
        with system.explained(staged.target, "reading what was left"):
            for entry in journal.entries(staged.path) if staged.resumed else ():
                file = home.get(entry.tensor)
                if file is not None and entry == file.entry(entry.tensor, entry.digest) and entry.tensor not in self._found:
                    if journal.holds(file.file, entry):
                        self._found[entry.tensor] = entry
        with system.explained(staged.target, "keeping a journal"):
            self._journal = Journal(staged.path, self._work)
        return frozenset(self._found)

    def keep(self, names: Collection[str]) -> None:
        """Go on from these tensors."""
        assert self._journal is not None
        with system.explained(self._target, "keeping a journal"):
            self._journal.append([self._found[name] for name in names])
        self.left += sum(self._found[name].length for name in names)

    def wrote(self, name: str, size: int) -> None:
        """Note that bytes of a tensor were written; now and then syncs what is finished and writes it down."""
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
        """Close the journal and let it lie if it speaks of a finished tensor; else, or when that was done before, False."""
        kept, self._journal = self._journal, None
        if kept is not None and self.left:
            kept.close()
            return True
        if kept is not None:
            kept.remove()
        return False

    def end(self) -> None:
        """Remove the journal of an output that is published, or whose stage is gone. Nothing after `leave`."""
        kept, self._journal = self._journal, None
        if kept is not None:
            kept.remove()
            self.left = 0


class CheckpointWriter:
    """A checkpoint whose complete layout is known, being written beside its target.

    Only `commit` publishes, and only when every byte of every tensor was written exactly once: leaving the
    ``with`` block without it, by an exception or not, leaves the target as it was and nothing beside it.

    >>> with CheckpointWriter.stage(Path("out.safetensors"), header) as out:
    ...     out.write("a.weight", 0, data)
    ...     out.commit()
    """

    def __init__(
        self, header: Header, staged: StagedFile | StagedFolder, files: Sequence[_File], progress: Progress | None = None
    ) -> None:
        self.header = header
        self.kept = frozenset[str]()
        self._progress = progress
        self._staged = staged
        self._files = files
        self._home: Mapping[str, _File] = MappingProxyType({name: f for f in files for name in f.header.tensors})
        self._lock = threading.Lock()
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in header.tensors}
        self._prepared = False
        if progress is not None:
            try:
                self.kept = progress.begin(staged, self._home)
            except BaseException:
                staged.discard()
                raise

    @property
    def left(self) -> int:
        """Bytes of finished tensors that `discard` left for a run that resumes."""
        return 0 if self._progress is None else self._progress.left

    @classmethod
    def stage(
        cls,
        target: Path,
        header: Header,
        *,
        overwrite: bool = False,
        shard_size: int | None = None,
        inputs: Sequence[InputFile] = (),
        extra_files: Mapping[str, bytes] = MappingProxyType({}),
        stem: str = STEM,
        resume: Work | None = None,
    ) -> CheckpointWriter:
        """Reserve the output's space beside ``target``.

        A target ending in ``.safetensors`` becomes one file, and ``extra_files`` are left out. Any other
        becomes a folder that diffusers can load: shards of at most ``shard_size`` bytes of tensor data (a
        larger tensor has one of its own) and their index, or one file when that suffices, and ``extra_files``
        (config.json). ``stem`` is what the files of a folder are called. ``inputs`` are the files that must not be replaced, nor change before `commit`. Raises
        UsageError for shards in a single file, OutputError when the target may not be written or does not
        fit, BusyError when another run holds it.
        """
        if target.suffix == ".safetensors":
            if shard_size is not None:
                raise UsageError(
                    f'"{target}" names one file, but shards need a folder; leave out ".safetensors" or the shard size.'
                )
            return _stage_file(target, header, overwrite, inputs, resume)
        parts: Sequence[shards.Shard] = ()
        if shard_size is not None:
            parts = shards.split(header, shard_size, stem=stem)
        if len(parts) <= 1:
            parts = [shards.Shard(f"{stem}.safetensors", header)]
        small = dict(extra_files)
        if len(parts) > 1:
            small[shards.index_name(stem)] = shards.index_json(parts)
        return _stage_folder(target, header, parts, small, overwrite, inputs, resume)

    @property
    def target(self) -> Path:
        """The path that `commit` makes or replaces, with links resolved."""
        return self._staged.target

    @property
    def not_resumed(self) -> str | None:
        """Why what an interrupted run left could not be gone on with; None where there was nothing, or it was."""
        return None if self._progress is None else self._progress.refused

    def keep(self, names: Collection[str]) -> None:
        """Take tensors of ``kept`` as written: an interrupted run wrote them, and their digests were found right."""
        for name in names:
            if name not in self.kept:
                raise ValueError(f"tensor {quoted(name)} was not kept")
            self._written[name] = [(0, self.header.tensors[name].nbytes)]
        if self._progress is not None:
            self._progress.keep(names)

    @property
    def removed(self) -> tuple[Path, ...]:
        """What killed runs on the same output had left, and staging this one deleted."""
        return self._staged.removed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Write the bytes [start, start + len(data)) of tensor ``name``; safe from several threads.

        Raises ValueError outside the tensor, OutputError when the disk is full, StorageError when it fails;
        after either of the latter nothing can be committed.
        """
        file = self._home.get(name)
        if file is None:
            raise ValueError(f"tensor {quoted(name)} is not in the planned header")
        info = file.header.tensors[name]
        view = data.cast("B")
        if start < 0 or start + len(view) > info.nbytes:
            raise ValueError(
                f"tensor {quoted(name)} has {info.nbytes} bytes; bytes {start} to {start + len(view)} are outside"
            )
        if not view:
            return
        file.write(info, start, view)
        with self._lock:
            self._written[name].append((start, start + len(view)))
        if self._progress is not None:
            self._progress.wrote(name, len(view))

    def prepare(self) -> None:
        """Write the headers and bring everything to stable storage: all of `commit` that takes long or is likely to fail.

        For several outputs of which none may be published unless all can be. Raises what `commit` does; the output is then discarded.
        """
        if self._prepared:
            return
        try:
            self._require_complete()
            for file in self._files:
                file.write_header()
            self._staged.prepare()
        except BaseException:
            self.discard()
            raise
        self._prepared = True

    def commit(self) -> None:
        """Write the headers and publish: the target is the complete new checkpoint, on stable storage.

        Raises RuntimeError, a bug of the caller, when a byte of a tensor was not written or was written
        twice, DataError when an input changed meanwhile, OutputError or StorageError when the storage fails.
        The target is then what it was; only a StorageError that says so comes after it was replaced.
        """
        self.prepare()
        try:
            self._staged.publish()
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove everything staged; the target keeps its old bytes. Idempotent, and nothing after `commit`.

        What was staged to be resumed, and has a finished tensor, lies where it is for a run that resumes it.
        """
        if self._progress is None:
            self._staged.discard()
        elif self._staged.ended:
            self._progress.end()
        elif self._progress.leave():
            self._staged.leave()
        else:
            self._staged.discard()

    def _require_complete(self) -> None:
        for name, info in self.header.tensors.items():
            end = 0
            for start, stop in sorted(self._written[name]):
                if start < end:
                    raise RuntimeError(f"tensor {quoted(name)} had byte {start} written twice; nothing was published")
                if start > end:
                    break
                end = stop
            if end != info.nbytes:
                raise RuntimeError(
                    f"tensor {quoted(name)} was written up to byte {end} of {info.nbytes}; nothing was published"
                )


def _stage_file(
    target: Path, header: Header, overwrite: bool, inputs: Sequence[InputFile], resume: Work | None
) -> CheckpointWriter:
    encoded = _encode(header)
    progress = None if resume is None else Progress({"another recipe": journal.digest_of(encoded), **resume})
    staged = StagedFile.create(
        target, header.file_size, overwrite=overwrite, inputs=inputs, adopt=progress and progress.accepts
    )
    return CheckpointWriter(header, staged, [_File(staged, header, encoded)], progress)


def _stage_folder(
    target: Path,
    header: Header,
    parts: Sequence[shards.Shard],
    small: Mapping[str, bytes],
    overwrite: bool,
    inputs: Sequence[InputFile],
    resume: Work | None,
) -> CheckpointWriter:
    encoded = [_encode(part.header) for part in parts]
    size = sum(part.header.file_size for part in parts) + sum(map(len, small.values()))
    progress = None
    if resume is not None:
        named = [text for part in parts for text in (part.name.encode(), _encode(part.header))]
        named += [text for name, data in small.items() for text in (name.encode(), data)]
        progress = Progress({"another recipe": journal.digest_of(*named), **resume})
    staged = StagedFolder.create(
        target, size, overwrite=overwrite, inputs=inputs, adopt=progress and progress.accepts
    )
    try:
        files = [
            _File(staged.add(part.name, part.header.file_size), part.header, raw)
            for part, raw in zip(parts, encoded, strict=True)
        ]
        for name, data in small.items():
            staged.add(name, len(data)).write(0, memoryview(data))
    except BaseException:
        staged.discard()
        raise
    return CheckpointWriter(header, staged, files, progress)


def _encode(header: Header) -> bytes:
    """The header's bytes, which fill the file exactly up to its data."""
    encoded = header.encode()
    if len(encoded) != header.data_start:
        raise ValueError(f"the header takes {len(encoded)} bytes, but its data starts at {header.data_start}; plan it")
    return encoded
