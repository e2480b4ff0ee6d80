"""Write a checkpoint: tensors in any order from any thread, then headers, then publish."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from mergetool.checkpoint import journal, shards
from mergetool.checkpoint.files import StagedFile, StagedFolder
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.journal import RunDigest
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.outputs import Target, model_target
from mergetool.checkpoint.progress import JournalKeeper, PlacedFile


class CheckpointWriter:
    """A checkpoint in the making, beside its target. Its complete layout is known.

    ``kept`` are the finished tensors of an interrupted run, ``resumed`` the bytes of those that `keep` took over.
    Only `commit` publishes, and only when every byte of every tensor was written exactly once. If the ``with`` block ends without it, by an
    exception or not, the target stays as it was, with nothing beside it.

    >>> with CheckpointWriter.stage(Path("out.safetensors"), header) as out:
    ...     out.write("a.weight", 0, data)
    ...     out.commit()
    """

    def __init__(
        self,
        header: Header,
        staged: StagedFile | StagedFolder,
        files: Sequence[PlacedFile],
        progress: JournalKeeper | None = None,
    ) -> None:
        self.header = header
        self.kept = frozenset[str]()
        self.resumed = 0
        self._progress = progress
        self._staged = staged
        self._files = files
        self._home: Mapping[str, PlacedFile] = MappingProxyType({name: f for f in files for name in f.header.tensors})
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
        target: Path | Target,
        header: Header,
        *,
        overwrite: bool = False,
        shard_size: int | None = None,
        inputs: Sequence[InputFile] = (),
        extra_files: Mapping[str, bytes] = MappingProxyType({}),
        stem: str = shards.STEM,
        resume: RunDigest | None = None,
    ) -> CheckpointWriter:
        """Reserve the output's space beside ``target``.

        What a path becomes, `outputs.model_target` says. In one file ``extra_files`` are left out. A folder holds shards of at most
        ``shard_size`` bytes of tensor data (a larger tensor has one of its own) and their index, or one file when that suffices, and
        ``extra_files`` (config.json). ``stem`` is what the files of a folder are called. ``inputs`` are the files that must not be replaced,
        nor change before `commit`. Raises what `outputs.model_target` raises, OutputError when the target may not be written or does not fit,
        BusyError when another run holds it.
        """
        target = model_target(target, shard_size=shard_size, overwrite=overwrite)
        if not target.is_folder:
            return _stage_file(target.path, header, overwrite, inputs, resume)
        parts, small = shards.folder(header, shard_size, extra_files, stem=stem)
        return _stage_folder(target.path, header, parts, small, overwrite, inputs, resume)

    @property
    def target(self) -> Path:
        """The path that `commit` makes or replaces, with links resolved."""
        return self._staged.target

    @property
    def not_resumed(self) -> str | None:
        """Say why an interrupted run's remains were not gone on with.

        None where there was nothing, or where it was gone on with.
        """
        return None if self._progress is None else self._progress.refused

    def keep(self, names: Collection[str]) -> None:
        """Take tensors of ``kept`` as written by an interrupted run. Their digests were found right."""
        for name in names:
            if name not in self.kept:
                raise ValueError(f"tensor {quoted(name)} was not kept")
            self._written[name] = [(0, self.header.tensors[name].nbytes)]
        if self._progress is not None:
            self._progress.keep(names)
        self.resumed += sum(self.header.tensors[name].nbytes for name in names)

    @property
    def removed(self) -> tuple[Path, ...]:
        """The remains of killed runs that staging this one deleted."""
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
        """Write the headers and sync everything: the slow and risky part of `commit`.

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
        """Write the headers and publish. The target is then the complete new checkpoint, on stable storage.

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
    target: Path, header: Header, overwrite: bool, inputs: Sequence[InputFile], resume: RunDigest | None
) -> CheckpointWriter:
    encoded = _encode(header)
    progress = None if resume is None else JournalKeeper({"another recipe": journal.digest_of(encoded), **resume})
    staged = StagedFile.create(
        target,
        header.file_size,
        overwrite=overwrite,
        inputs=inputs,
        adopt=progress.accepts if progress is not None else None,
    )
    return CheckpointWriter(header, staged, [PlacedFile(staged, header, encoded)], progress)


def _stage_folder(
    target: Path,
    header: Header,
    parts: Sequence[shards.Shard],
    small: Mapping[str, bytes],
    overwrite: bool,
    inputs: Sequence[InputFile],
    resume: RunDigest | None,
) -> CheckpointWriter:
    encoded = [_encode(part.header) for part in parts]
    size = sum(part.header.file_size for part in parts) + sum(map(len, small.values()))
    progress = None
    if resume is not None:
        named = [text for part in parts for text in (part.name.encode(), _encode(part.header))]
        named += [text for name, data in small.items() for text in (name.encode(), data)]
        progress = JournalKeeper({"another recipe": journal.digest_of(*named), **resume})
    staged = StagedFolder.create(
        target, size, overwrite=overwrite, inputs=inputs, adopt=progress.accepts if progress is not None else None
    )
    try:
        files = [
            PlacedFile(staged.add(part.name, part.header.file_size), part.header, raw)
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
