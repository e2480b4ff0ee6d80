"""Models in several files: which file of a folder to open, the index read and written, and how to split.

An index comes from strangers and names files, so every name must be a plain one (`names.why_not_plain`), and
index and shards must tell the same story both ways.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergetool.checkpoint import strict_json
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.names import folded, quoted, why_not_plain
from mergetool.errors import InputMissing, ShardIndexError, UsageError

SUFFIX = ".safetensors"
INDEX_SUFFIX = ".index.json"
STEM = "diffusion_pytorch_model"
PREFERRED = (STEM, "model")  # the names diffusers and transformers give
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
MAX_INDEX = 100_000_000
MAX_SHARDS = 1_000  # the largest public models have about 200; each shard costs an open file

_PICKLED_INDEX = tuple(suffix + INDEX_SUFFIX for suffix in PICKLES)
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class ShardIndex:
    """What a ``*.index.json`` says: the file each tensor is in. An unsafe one cannot be made.

    ``shards`` are the file names, sorted. Raises ShardIndexError, naming ``source``, for a name that is not a
    plain ``.safetensors`` file name, names that a case-insensitive system takes for one, and over 1,000 shards.
    """

    weight_map: Mapping[str, str]
    source: str

    def __post_init__(self) -> None:
        shards = self.shards
        if len(shards) > MAX_SHARDS:
            raise ShardIndexError(f'"{self.source}" names {len(shards)} shards, but the limit is {MAX_SHARDS}.')
        seen: dict[str, str] = {}
        for shard in shards:
            reason = why_not_plain(shard, SUFFIX)
            if reason is not None:
                raise ShardIndexError(
                    f'"{self.source}" names the shard {quoted(shard)}, which is refused because {reason}; '
                    "download the model again from a source you trust."
                )
            other = seen.setdefault(folded(shard), shard)
            if other != shard:
                raise ShardIndexError(
                    f'"{self.source}" names the shards {quoted(other)} and {quoted(shard)}, '
                    "which some systems take for one file; rename one of them."
                )
        object.__setattr__(self, "weight_map", MappingProxyType(dict(self.weight_map)))

    @property
    def shards(self) -> tuple[str, ...]:
        """The file names, sorted."""
        return tuple(sorted(set(self.weight_map.values())))

    @classmethod
    def parse(cls, raw: bytes, *, source: str) -> ShardIndex:
        """The index spelled by ``raw``; raises ShardIndexError unless it is strict JSON with a usable weight_map."""
        require_index_size(len(raw), source)
        try:
            root = strict_json.loads(raw)
        except ValueError as error:
            raise ShardIndexError(f'"{source}" has {error}; download it again.') from None
        weight_map = root.get("weight_map") if isinstance(root, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ShardIndexError(f'"{source}" has no "weight_map" of tensor and file names; download it again.')
        for name, shard in weight_map.items():
            if not isinstance(shard, str):
                raise ShardIndexError(f'"{source}" gives tensor {quoted(name)} a file name that is not a string.')
        return cls(weight_map, source)

    def require_agreement(self, headers: Mapping[str, Header]) -> None:
        """Raises ShardIndexError unless every tensor is in the shard the index says, and in no other.

        ``headers`` has the header of every shard, by file name.
        """
        for name, shard in self.weight_map.items():
            if name not in headers[shard].tensors:
                raise ShardIndexError(
                    f'"{self.source}" says that tensor {quoted(name)} is in {quoted(shard)}, but it is not; '
                    "the files belong to different models, download them again."
                )
        for shard, header in headers.items():
            for name in header.tensors:
                if self.weight_map.get(name) != shard:
                    said = self.weight_map.get(name)
                    where = "does not list it" if said is None else f"says it is in {quoted(said)}"
                    raise ShardIndexError(
                        f'"{self.source}": tensor {quoted(name)} is in {quoted(shard)}, but the index {where}; '
                        "the files belong to different models, download them again."
                    )


def require_index_size(size: int, source: str) -> None:
    """Raises ShardIndexError for an index of more than 100 MB, before it is read."""
    if size > MAX_INDEX:
        raise ShardIndexError(f'"{source}" has {size} bytes, but the limit for an index is {MAX_INDEX}.')


def choose(folder: Path) -> Path:
    """The index or the one safetensors file that ``folder`` is about: of a diffusers pipeline, its transformer's.

    Raises what `pick` raises.
    """
    names = _files_in(folder)
    transformer = folder / "transformer"
    if is_pipeline(names) and _is_real_folder(transformer):
        return choose(transformer)
    return folder / pick(names, str(folder))


def is_pipeline(names: Sequence[str]) -> bool:
    """True where a folder with these files is looked at for its ``transformer`` folder first."""
    return "model_index.json" in names or not _candidates(names)


def pick(names: Sequence[str], source: str) -> str:
    """The name to open among a folder's file names.

    It is the only ``*.index.json``, else the only ``*.safetensors``, else the one with a name that diffusers or
    transformers gives. Raises UsageError listing the candidates when several remain, InputMissing when there is none.
    """
    candidates = _candidates(names)
    if not candidates:
        raise InputMissing(_nothing(source, names))
    indices = [name for name in candidates if name.endswith(INDEX_SUFFIX)]
    for group in (indices, candidates):
        if len(group) == 1:
            return group[0]
    for stem in PREFERRED:
        for name in (f"{stem}{SUFFIX}{INDEX_SUFFIX}", f"{stem}{SUFFIX}"):
            if name in candidates:
                return name
    raise UsageError(_ambiguous(source, candidates))


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a model to be written: its name and its complete header."""

    name: str
    header: Header


def split(header: Header, shard_size: int, *, stem: str = STEM) -> tuple[Shard, ...]:
    """The files that together hold ``header``'s tensors, in its order, each with at most ``shard_size`` data bytes.

    A tensor larger than that has a file of its own. Every file carries the whole metadata. Names are
    ``STEM-0000N-of-0000M.safetensors``. Raises UsageError for a size that is not positive or makes over 1,000
    files.
    """
    if shard_size < 1:
        raise UsageError(f"a shard size of {shard_size} bytes holds nothing; name one such as 5GB.")
    groups: list[list[str]] = [[]]
    filled = 0
    for name, info in header.tensors.items():
        if groups[-1] and filled + info.nbytes > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += info.nbytes
    if len(groups) > MAX_SHARDS:
        raise UsageError(
            f"a shard size of {shard_size} bytes makes {len(groups)} files, but the limit is {MAX_SHARDS}; "
            "name a larger one."
        )
    return tuple(
        Shard(
            f"{stem}-{number:05d}-of-{len(groups):05d}{SUFFIX}",
            Header.plan(
                [(name, header.tensors[name].dtype, header.tensors[name].shape) for name in group], header.metadata
            ),
        )
        for number, group in enumerate(groups, 1)
    )


def folder(
    header: Header, shard_size: int | None, extra_files: Mapping[str, bytes], *, stem: str = STEM
) -> tuple[Sequence[Shard], dict[str, bytes]]:
    """What a folder output consists of: its safetensors files, one where that suffices, and its small files by name.

    Raises what `split` raises.
    """
    parts: Sequence[Shard] = () if shard_size is None else split(header, shard_size, stem=stem)
    if len(parts) <= 1:
        return [Shard(f"{stem}{SUFFIX}", header)], dict(extra_files)
    return parts, {**extra_files, index_name(stem): index_json(parts)}


def is_model_folder(folder: Path) -> bool:
    """Whether ``folder`` looks like one that holds a model: it has a config, an index, or a file with a name that libraries give."""
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    known = {"config.json", *(f"{stem}{SUFFIX}" for stem in PREFERRED)}
    return any(name in known or name.endswith(INDEX_SUFFIX) for name in names)


def stem_of(file: str) -> str:
    """What a folder's files are called, by the name of one of them: "model" as transformers has it, else "diffusion_pytorch_model".

    Example: ``stem_of("model-00001-of-00003.safetensors")`` is ``"model"``.
    """
    return next((stem for stem in PREFERRED if re.match(rf"{stem}[.-]", file)), STEM)


def index_name(stem: str = STEM) -> str:
    """The name under which diffusers and transformers look for the index of shards named by ``stem``."""
    return f"{stem}{SUFFIX}{INDEX_SUFFIX}"


def index_json(shards: Sequence[Shard]) -> bytes:
    """The index of ``shards`` as UTF-8 JSON: tensor names sorted, ``total_size`` in data bytes; no name, no time."""
    weight_map = {name: shard.name for shard in shards for name in shard.header.tensors}
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(shard.header.data_size for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


def _files_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:  # hidden ones are our own temporaries and macOS's "._" twins
            return sorted(entry.name for entry in entries if not entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputMissing(f'"{folder}" cannot be listed ({error.strerror}); check the path.') from None


def _is_real_folder(path: Path) -> bool:
    """A link is not one: a downloaded pipeline must not lead to another place of the disk."""
    try:
        return stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError:
        return False


def _candidates(names: Sequence[str]) -> list[str]:
    """The indices, but not those of pickled shards, and the safetensors files."""
    indices = [name for name in names if name.endswith(INDEX_SUFFIX) and not name.endswith(_PICKLED_INDEX)]
    return indices + [name for name in names if name.endswith(SUFFIX)]


def _nothing(source: str, names: Sequence[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f'"{source}" holds {quoted(pickles[0])} but no .safetensors file, and pickles are never loaded; '
            "convert the model to safetensors first."
        )
    return f'"{source}" holds no .safetensors file and no {INDEX_SUFFIX} file; check the path.'


def _ambiguous(source: str, candidates: Sequence[str]) -> str:
    shards = [match for match in map(_SHARD.fullmatch, candidates) if match]
    if len(shards) == len(candidates) and len({match["stem"] for match in shards}) == 1:
        wanted = index_name(shards[0]["stem"])
        return f'"{source}" holds {len(shards)} shards but not their index {quoted(wanted)}; download it too.'
    listed = ", ".join(map(quoted, candidates[:8])) + (", …" if len(candidates) > 8 else "")
    return f'"{source}" holds {len(candidates)} models ({listed}); name one of them.'
