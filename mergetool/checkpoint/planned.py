"""The files of a planned output, byte for byte but for the tensors. They can be compared with the files on the disk."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mergetool.checkpoint import shards
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """One file: its ``path``, its first bytes and its length. The first bytes of a small file are all of it."""

    path: Path
    start: bytes
    size: int


def planned_files(
    target: Path,
    header: Header,
    *,
    shard_size: int | None,
    extra_files: Mapping[str, bytes],
    stem: str = shards.STEM,
    single: bool,
) -> tuple[PlannedFile, ...]:
    """The files that `CheckpointWriter.stage` would write at ``target`` with these arguments.

    They are a ``single`` one, or a folder's.

    Raises UsageError for a shard size that makes too many.
    """
    if single:
        return (PlannedFile(target, header.encode(), header.file_size),)
    parts, small = shards.folder(header, shard_size, extra_files, stem=stem)
    files = [PlannedFile(target / part.name, part.header.encode(), part.header.file_size) for part in parts]
    return (*files, *(PlannedFile(target / name, data, len(data)) for name, data in small.items()))


def first_difference(target: Path, files: tuple[PlannedFile, ...]) -> str:
    """Say where the file or folder at ``target`` stops being ``files``, apart from tensors.

    Empty where it is all of them.

    Raises InputMissing, DataError or StorageError for what cannot be read.
    """
    if files[0].path != target:
        there = {entry.name for entry in os.scandir(target) if not entry.name.startswith(".")}
        for name in sorted(there ^ {file.path.name for file in files}):
            return f"{quoted(name)} is {'not part of it' if name in there else 'missing'}"
    for file in files:
        with InputFile.open(file.path) as opened:
            stored = opened.read(0, min(opened.size, len(file.start)))
            if stored != file.start:
                same = next(
                    (i for i, (a, b) in enumerate(zip(stored, file.start, strict=False)) if a != b), len(stored)
                )
                return f"{quoted(file.path.name)} differs at byte {same}, before its tensors"
            if opened.size != file.size:
                return f"{quoted(file.path.name)} has {opened.size} bytes instead of {file.size}"
    return ""


def shard_size_of(sizes: list[list[int]]) -> int | None:
    """Find a shard size that splits tensors into groups of these sizes.

    The tensors are in this order; None for one group.

    The largest group of several tensors was within the size that was asked for, and every group was full by it: so splitting by that
    group's size ends every group where it ended.
    """
    if len(sizes) < 2:
        return None
    return max((sum(group) for group in sizes if len(group) > 1), default=1) or 1
