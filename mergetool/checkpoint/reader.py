"""Read a model's files in place, as named tensors.

A model is a safetensors or GGUF file, or a folder of shards with its index.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

from mergetool.checkpoint import gguf, shards, strict_json
from mergetool.checkpoint.gguf import GgufHeader, Packed
from mergetool.checkpoint.header import MAX_HEADER, Header, TensorInfo, header_length
from mergetool.checkpoint.inputs import InputFile, Readable, leads_out
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.shards import ShardIndex
from mergetool.errors import DataError, HeaderError, ShardIndexError

MAX_CONFIG = 1_000_000
SAMPLE = 64 * 1024

_HASHED_AT_ONCE = 8 * 1024 * 1024
_CONVERT = "convert it to safetensors with the program that made it"
_PICKLE = f"is a pickle, which can run code and is never loaded; {_CONVERT}"
_OTHER_CONTENT: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", f"is a zip archive as torch.save writes it: it {_PICKLE}"),
    (b"PK\x05\x06", f"is a zip archive as torch.save writes it: it {_PICKLE}"),
    *((bytes([0x80, protocol]), _PICKLE) for protocol in range(6)),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model; fetch the model with: git lfs pull"),
    (b"<", "is a web page, not a model; download the model again, logged in if its page asks for that"),
    (b"{", "is a JSON text, as servers send in place of a file; read it, and download the model again"),
    (b"\x89PNG", "is a picture, not a model; name the model's file"),
    *((magic, "is an archive, not a model; unpack it") for magic in (b"7z\xbc\xaf", b"Rar!", b"\x1f\x8b")),
    (b"\x89HDF", f"is an HDF5 file of another library; {_CONVERT}"),
    (bytes(16), "begins with zeros: a download that reserved its space and did not end; download it again"),
)
_PARTIAL = (".part", ".partial", ".aria2", ".crdownload", ".download", ".incomplete", ".tmp", ".!qb", ".st")
"""The endings that downloading programs give a file that is not complete, or a companion of it."""


_OF_MODELS = frozenset(
    {"_class_name", "_diffusers_version", "architectures", "model_type"}
)  # keys of diffusers' and transformers' configs
Container = Literal["safetensors", "sharded safetensors", "GGUF"]


class Checkpoint:
    """A read view over one model. Opening reads headers only; tensors are read where they lie.

    ``source`` is the user's name for it. ``tensors`` maps every name to its TensorInfo in file order, shard after shard; offsets count from
    the data section of each file (see `locate`). ``files`` are the files on the disk, or the operands' for a computed checkpoint; they must
    not change. ``metadata`` is that of the file, or of all shards together; where shards differ, the first one wins. ``config`` is the
    ``config.json`` of a folder or an index, or beside a file with one of diffusers' names. ``packed`` has the block tensors of a GGUF file,
    which appear as bytes in ``tensors``. All methods may be called from several threads.
    """

    source: str
    files: tuple[InputFile, ...]
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    config: Mapping[str, Any] | None
    container: Container
    packed: Mapping[str, Packed]
    memory: int = 0
    """Bytes that reading takes besides the reader's own: of files none."""

    def __init__(
        self,
        source: str,
        parts: Sequence[tuple[Readable, Header | GgufHeader]],
        files: Sequence[InputFile],
        config: Mapping[str, Any] | None,
        container: Container,
    ) -> None:
        self.source = source
        self.files = tuple(files)
        self.config = config
        self.container = container
        self._places = {name: (file, header.data_start) for file, header in parts for name in header.tensors}
        self.tensors = MappingProxyType({n: info for _, header in parts for n, info in header.tensors.items()})
        metadata: dict[str, str] = {}
        for _, header in parts:
            metadata = {**header.metadata, **metadata}
        self.metadata = MappingProxyType(metadata)
        self.packed = MappingProxyType(
            {
                name: kind
                for _, header in parts
                if isinstance(header, GgufHeader)
                for name, kind in header.packed.items()
            }
        )

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open the model at ``path``: a file, an ``*.index.json``, or a folder (`shards.choose`).

        Files are safetensors or GGUF.

        What a file is, its content says, not its name. Links are followed, in folders too; but a shard that an index names is a plain name
        in its folder, and a ``config.json`` that is a link out of it must be a model's. Raises
        InputMissing when something is not there, HeaderError and ShardIndexError for broken files, DataError
        for pickles and other content, UsageError for a folder of several models.
        """
        place = Path(path)
        is_folder = place.is_dir()
        chosen = shards.choose(place) if is_folder else place
        is_index = shards.is_index(chosen.name)
        has_config = is_folder or is_index or chosen.name.startswith(shards.PREFERRED)
        with ExitStack() as opened:
            config = _read_config(chosen.parent) if has_config else None
            if is_index:
                parts: Sequence[tuple[InputFile, Header | GgufHeader]] = _open_shards(chosen, opened)
                kind: Container = "sharded safetensors"
            else:
                parts = [_open_single(chosen, opened)]
                kind = "GGUF" if isinstance(parts[0][1], GgufHeader) else "safetensors"
            checkpoint = cls(str(path), parts, [file for file, _ in parts], config, kind)
            opened.pop_all()
        return checkpoint

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every file. Idempotent."""
        for file in self.files:
            file.close()

    def check_unchanged(self) -> None:
        """Raises DataError when a file changed since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def locate(self, name: str) -> tuple[Readable, int]:
        """Find a tensor's file and the absolute offset of its first byte. KeyError for an unknown name."""
        file, data_start = self._places[name]
        return file, data_start + self.tensors[name].begin

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Bytes ``[start, start + size)`` of a tensor, all from ``start`` on without ``size``.

        Raises KeyError for an unknown name, ValueError outside the tensor, and what `InputFile.read` raises.
        """
        info = self.tensors[name]
        wanted = info.nbytes - start if size is None else size
        if start < 0 or wanted < 0 or start + wanted > info.nbytes:
            raise ValueError(
                f"tensor {quoted(name)} has {info.nbytes} bytes; {start} to {start + wanted} are not in it"
            )
        file, offset = self.locate(name)
        return file.read(offset + start, wanted)

    def fingerprint(self) -> str:
        """``sample-sha256:HEX`` of the header's facts and of samples of every tensor.

        The facts are names, dtypes, shapes and metadata.

        The samples are the first, middle and last 64 KiB; smaller tensors count whole. Of a 12 GB model that
        reads about 55 MB, and any merge, training step or cast shows; an edit between the samples does not,
        `sha256` finds that. It does not depend on paths, on the order of tensors or on how they are split into files.
        """
        for name, info in self.tensors.items():
            file, offset = self.locate(name)
            for start, size in _samples(info.nbytes):
                # Announced all at once a cold disk answers out of order: 0.3 s for a 12 GB model, 0.6 s without.
                file.will_need(offset + start, size)
        samples = {name: hashlib.sha256() for name in self.tensors}
        for name, info in self.tensors.items():
            for start, size in _samples(info.nbytes):
                samples[name].update(self.read(name, start, size))
        for file in self.files:
            file.forget(
                0, file.size
            )  # small pages that are strewn over a file in the cache divide what is read into it later
        table = [
            [name, self.tensors[name].dtype.code, self.tensors[name].shape, samples[name].hexdigest()]
            for name in sorted(self.tensors)
        ]
        canonical = json.dumps([table, sorted(self.metadata.items())], separators=(",", ":"))
        return f"sample-sha256:{hashlib.sha256(canonical.encode()).hexdigest()}"

    def sha256(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        """The SHA-256 of every file, in hex, by file name; ``progress`` gets the bytes of each step.

        The same as ``sha256sum`` prints, and what model sites show, whole or ("AutoV2") its first 10 digits.
        """
        buffer = bytearray(_HASHED_AT_ONCE)
        digests = {}
        for file in self.files:
            digest = hashlib.sha256()
            for offset in range(0, file.size, _HASHED_AT_ONCE):
                view = memoryview(buffer)[: min(_HASHED_AT_ONCE, file.size - offset)]
                file.will_need(offset + len(view), min(_HASHED_AT_ONCE, file.size - offset - len(view)))
                file.read_into(view, offset)
                digest.update(view)
                file.release(offset, len(view))
                if progress is not None:
                    progress(len(view))
            digests[file.path.name] = digest.hexdigest()
        return digests


def _samples(size: int) -> Iterator[tuple[int, int]]:
    if size <= 3 * SAMPLE:
        yield 0, size
    else:
        yield from ((0, SAMPLE), ((size - SAMPLE) // 2, SAMPLE), (size - SAMPLE, SAMPLE))


def _open_single(path: Path, opened: ExitStack) -> tuple[InputFile, Header | GgufHeader]:
    file = opened.enter_context(InputFile.open(path))
    if file.read(0, min(file.size, len(gguf.MAGIC))) == gguf.MAGIC:
        return file, GgufHeader.read(file.read, file_size=file.size, source=str(path))
    return file, _header_of(file, path)


def _open_file(path: Path, opened: ExitStack) -> tuple[InputFile, Header]:
    file = opened.enter_context(InputFile.open(path))
    return file, _header_of(file, path)


def _header_of(file: InputFile, path: Path) -> Header:
    start = file.read(0, min(file.size, 32))
    if not _looks_like_safetensors(start, file.size):
        text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
        for magic, meaning in _OTHER_CONTENT:
            if start.startswith(magic) or (magic in b"<{" and text.startswith(magic)):
                raise DataError(f'"{path}" {meaning}.')
    try:
        length = header_length(start, file_size=file.size, source=str(path))
        return Header.parse(file.read(0, 8 + length), file_size=file.size, source=str(path))
    except HeaderError:
        _require_complete(path)
        raise


def _require_complete(path: Path) -> None:
    """Raises HeaderError where a file's name, or another beside it, says that it is still being downloaded."""
    if path.name.lower().endswith(_PARTIAL):
        raise HeaderError(f'"{path}" is a download that did not end; let it end, or download the model again.')
    for beside in (path.with_name(path.name + ending) for ending in _PARTIAL):
        if os.path.lexists(beside):
            raise HeaderError(
                f'"{path}" is not complete: "{beside.name}" beside it is of a download that did not end; let it end, or download the model again.'
            )


def _looks_like_safetensors(start: bytes, file_size: int) -> bool:
    """Asked first, because the length of a good header may be spelled like a pickle: 640 is 80 02 00 00 ...."""
    length = int.from_bytes(start[:8], "little")
    return 8 + length <= file_size and length <= MAX_HEADER and start[8:9] in (b"{", b" ", b"\n", b"\r", b"\t")


def _open_shards(index_path: Path, opened: ExitStack) -> list[tuple[InputFile, Header]]:
    with InputFile.open(index_path) as file:
        shards.require_index_size(file.size, str(index_path))
        index = ShardIndex.parse(file.read(0, file.size), source=str(index_path))
    parts = []
    header_bytes = 0
    for name in index.shards:
        part = _open_file(index_path.parent / name, opened)
        header_bytes += part[1].data_start
        if header_bytes > MAX_HEADER:
            raise ShardIndexError(f'"{index_path}": the headers of its shards exceed {MAX_HEADER} bytes together.')
        parts.append(part)
    index.require_agreement(dict(zip(index.shards, (header for _, header in parts), strict=True)))
    return parts


def _read_config(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "config.json"
    if not os.path.lexists(path):
        return None
    with InputFile.open(path) as file:
        if file.size > MAX_CONFIG:
            raise DataError(
                f'"{path}" has {file.size} bytes, but the limit for a config is {MAX_CONFIG}; move it away.'
            )
        try:
            config = strict_json.loads(file.read(0, file.size))
        except ValueError as error:
            raise DataError(f'"{path}" has {error}; download it again.') from None
    if not isinstance(config, dict):
        raise DataError(f'"{path}" is not a JSON object; download it again.')
    # A config travels on into outputs, so a downloaded folder must not lead to somebody's private settings.
    if leads_out(path) and not _OF_MODELS & config.keys():
        raise DataError(f'"{path}" is a link out of its folder to a file that is no model\'s config; remove the link.')
    return MappingProxyType(config)
