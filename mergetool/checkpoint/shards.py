"""Models in several files: choose a folder's file, read and write the index, split tensors.

An index comes from strangers and names files, so every name must be a plain one (`names.why_not_plain`), and
index and shards must tell the same story both ways.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
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

# diffusers and transformers have put the variant ("fp16") in four places: NAME.fp16.safetensors, NAME.fp16-00001-of-00002.safetensors,
# NAME-00001-of-00002.fp16.safetensors, NAME.safetensors.index.fp16.json (and the hub has NAME.fp16.safetensors.index.json).
_NAME = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<before>[A-Za-z]\w*))?(?P<number>-\d{5}-of-\d{5})?(?:\.(?P<between>[A-Za-z]\w*))?"
    r"\.safetensors(?P<index>\.index(?:\.(?P<after>\w+))?\.json)?",
    re.IGNORECASE,
)
_INDEX = re.compile(r".+\.index(?:\.\w+)?\.json", re.IGNORECASE)


@dataclass(frozen=True)
class ShardIndex:
    """The file that each tensor is in, by a ``*.index.json``.

    An unsafe index cannot be made.

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
        """Parse an index from ``raw``. Raises ShardIndexError unless it is strict JSON with a usable weight_map."""
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
        """Raises ShardIndexError unless every tensor is in the index's shard alone.

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
    """Find the index or the one weights file of ``folder``. Of a diffusers pipeline it is the transformer's or U-Net's.

    A pipeline is a diffusers folder.

    Of a repository in Hugging Face's cache it is that of the revision ``main``. Raises what `pick` raises, and UsageError for a pipeline of several
    denoising models.
    """
    snapshot = _snapshot_in(folder)
    if snapshot is not None:
        return choose(snapshot)
    names = _files_in(folder)
    if is_pipeline(names):
        folders = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
        parts = denoisers(folders)
        if parts:
            return choose(folder / one_denoiser(parts, str(folder)))
        inner = [] if _candidates(names) else [name for name in folders if _holds_model(folder / name)]
        if inner:
            listed = ", ".join(quoted(str(folder / name)) for name in inner[:8])
            raise UsageError(f'"{folder}" holds no model itself, but its folders do; name one of them: {listed}.')
    return folder / pick(names, str(folder))


def is_pipeline(names: Sequence[str]) -> bool:
    """Whether a folder of these files is first searched for a denoising model's folder."""
    return "model_index.json" in names or not _candidates(names)


def denoisers(folders: Iterable[str]) -> list[str]:
    """Pick the folders of a pipeline that hold a denoising model."""
    return sorted(name for name in folders if re.fullmatch(r"(?:transformer|unet)(?:_\d+)?", name))


def one_denoiser(parts: Sequence[str], source: str) -> str:
    """The only one of ``parts``; raises UsageError, naming them, where there are several."""
    if len(parts) == 1:
        return parts[0]
    listed = " and ".join(f'"{source}/{part}"' for part in parts)
    raise UsageError(f'"{source}" is a pipeline of {len(parts)} models that denoise; name one of them: {listed}.')


def companions(source: str | Path) -> list[str]:
    """Find the other models that denoise in the pipeline of ``source``.

    It is a folder, or a file in one, of a pipeline that has several, as ``transformer`` beside ``transformer_2``. There are none for other models.
    """
    place = Path(source)
    folder = place if place.is_dir() else place.parent
    if not denoisers([folder.name]):
        return []
    try:
        beside = [entry.name for entry in os.scandir(folder.parent) if entry.is_dir()]
    except OSError:
        return []
    others = [name for name in denoisers(beside) if name != folder.name and _holds_model(folder.parent / name)]
    return [str(folder.parent / name) for name in others]


def is_index(name: str) -> bool:
    """Whether a file of this name is an index of safetensors shards.

    Names are spelled as by diffusers and transformers.
    """
    return _INDEX.fullmatch(name) is not None and not any(f"{suffix}.index" in name for suffix in PICKLES)


def pick(names: Sequence[str], source: str) -> str:
    """The name to open among a folder's file names.

    It is the only index, else the only weights file, else the one with a name that diffusers or transformers gives. Raises UsageError
    listing the candidates when several remain, or several variants (fp16 beside full precision) of one; InputMissing when there is none.
    """
    candidates = _candidates(names)
    if not candidates:
        raise InputMissing(_nothing(source, names))
    indices = [name for name in candidates if is_index(name)]
    chosen = next((group[0] for group in (indices, candidates) if len(group) == 1), None) or _preferred(candidates)
    if chosen is None:
        raise UsageError(_ambiguous(source, candidates))
    rivals = [
        name
        for name in candidates
        if not _is_shard(name) and _stem(name) == _stem(chosen) and _variant(name) != _variant(chosen)
    ]
    if rivals:
        listed = ", ".join(map(quoted, [chosen, *rivals]))
        raise UsageError(f'"{source}" holds {1 + len(rivals)} variants of one model ({listed}); name one file.')
    return chosen


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a model to be written: its name and its complete header."""

    name: str
    header: Header


def split(header: Header, shard_size: int, *, stem: str = STEM) -> tuple[Shard, ...]:
    """Split ``header``'s tensors into files of at most ``shard_size`` data bytes.

    They keep their order.

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
    """The safetensors files and the small files of a folder output.

    One safetensors file is made where that suffices; small ones are by name.

    Raises what `split` raises.
    """
    parts: Sequence[Shard] = () if shard_size is None else split(header, shard_size, stem=stem)
    if len(parts) <= 1:
        return [Shard(f"{stem}{SUFFIX}", header)], dict(extra_files)
    return parts, {**extra_files, index_name(stem): index_json(parts)}


def is_model_folder(folder: Path) -> bool:
    """Whether ``folder`` looks like a model: it has a config, an index, or a usual file name.

    Usual names are those that libraries give.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return False
    known = {"config.json", *(f"{stem}{SUFFIX}" for stem in PREFERRED)}
    return any(name in known or is_index(name) for name in names)


def stem_of(file: str) -> str:
    """The stem of a folder's file names, by one of them.

    It is "model" as transformers has it, else "diffusion_pytorch_model".

    Example: ``stem_of("model-00001-of-00003.safetensors")`` is ``"model"``.
    """
    return next((stem for stem in PREFERRED if re.match(rf"{stem}[.-]", file)), STEM)


def index_name(stem: str = STEM) -> str:
    """The file name of the index of shards named by ``stem``.

    diffusers and transformers look for it.
    """
    return f"{stem}{SUFFIX}{INDEX_SUFFIX}"


def index_json(shards: Sequence[Shard]) -> bytes:
    """The index of ``shards`` as UTF-8 JSON, tensor names sorted.

    ``total_size`` is in data bytes; there is no name and no time.
    """
    weight_map = {name: shard.name for shard in shards for name in shard.header.tensors}
    index: dict[str, Any] = {
        "metadata": {"total_size": sum(shard.header.data_size for shard in shards)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


def _snapshot_in(folder: Path) -> Path | None:
    """The snapshot to open of a repository in Hugging Face's cache, None for any other folder."""
    snapshots = folder / "snapshots"
    if not (snapshots.is_dir() and (folder.name.startswith("models--") or (folder / "refs").is_dir())):
        return None
    revisions = sorted(entry.name for entry in os.scandir(snapshots) if entry.is_dir())
    if len(revisions) == 1:
        return snapshots / revisions[0]
    try:
        with open(folder / "refs" / "main", "rb") as file:
            main = file.read(100).decode("ascii", "replace").strip()
    except OSError:
        main = ""
    if main in revisions:
        return snapshots / main
    if not revisions:
        raise InputMissing(
            f'"{folder}" is a repository in Hugging Face\'s cache of which nothing was downloaded; download the model.'
        )
    listed = ", ".join(quoted(str(snapshots / name)) for name in revisions[:8])
    raise UsageError(
        f'"{folder}" holds {len(revisions)} revisions of a repository, and none is called main; name one: {listed}.'
    )


def _holds_model(folder: Path) -> bool:
    return bool(_candidates(_files_in(folder))) or (folder / "snapshots").is_dir()


def _files_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:  # hidden ones are our own temporaries and macOS's "._" twins
            return sorted(entry.name for entry in entries if not entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise InputMissing(f'"{folder}" cannot be listed ({error.strerror}); check the path.') from None


def _candidates(names: Sequence[str]) -> list[str]:
    """The indices, but not those of pickled shards, and the safetensors files; where there are none, the GGUF files."""
    weights = [name for name in names if name.lower().endswith((SUFFIX, ".sft"))]
    return [name for name in names if is_index(name)] + weights or [n for n in names if n.lower().endswith(".gguf")]


def _preferred(candidates: Sequence[str]) -> str | None:
    """The candidate with a name that diffusers or transformers gives: an index before a file, full precision before a variant."""
    whole = [name for name in candidates if not _is_shard(name) and _stem(name) in PREFERRED]
    return min(whole, key=lambda n: (PREFERRED.index(_stem(n)), bool(_variant(n)), not is_index(n)), default=None)


def _stem(name: str) -> str:
    match = _NAME.fullmatch(name)
    return match["stem"] if match else name


def _variant(name: str) -> str:
    """The ``fp16`` of ``model.fp16.safetensors``, wherever in the name it stands; empty for none."""
    match = _NAME.fullmatch(name)
    return next(filter(None, (match["before"], match["between"], match["after"])), "") if match else ""


def _is_shard(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match["number"] is not None


def _nothing(source: str, names: Sequence[str]) -> str:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f'"{source}" holds {quoted(pickles[0])} but no .safetensors file, and pickles are never loaded; '
            "convert the model to safetensors first."
        )
    return f'"{source}" holds no .safetensors file and no {INDEX_SUFFIX} file; check the path.'


def _ambiguous(source: str, candidates: Sequence[str]) -> str:
    if all(map(_is_shard, candidates)) and len({(_stem(name), _variant(name)) for name in candidates}) == 1:
        stem, variant = _stem(candidates[0]), _variant(candidates[0])
        wanted = f"{stem}{SUFFIX}.index.{variant}.json" if variant else index_name(stem)
        return f'"{source}" holds {len(candidates)} shards but not their index {quoted(wanted)}; download it too.'
    listed = ", ".join(map(quoted, candidates[:8])) + (", …" if len(candidates) > 8 else "")
    return f'"{source}" holds {len(candidates)} models ({listed}); name one of them.'
