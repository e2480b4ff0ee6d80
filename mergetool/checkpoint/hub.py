"""Models on the Hugging Face Hub: ``hf://ORG/REPO[/FOLDER or FILE][@REVISION]`` becomes a path in its cache."""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from mergetool.checkpoint import shards
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.shards import ShardIndex
from mergetool.errors import DataError, InputMissing, MergetoolError, UsageError

SCHEME = "hf://"

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_FORM = "hf://org/repo, hf://org/repo/folder or hf://org/repo/folder/file.safetensors, each with @revision at will"
_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._ +()-]+")


@dataclass(frozen=True)
class HubAddress:
    """A repository (``org/repo``), a folder or file inside it ("" for its root), and a revision (None for main)."""

    repo: str
    inside: str
    revision: str | None

    @classmethod
    def parse(cls, text: str) -> HubAddress:
        """Example: ``hf://Tongyi-MAI/Z-Image/transformer@main``. Raises UsageError for anything else."""
        place, at, revision = text.removeprefix(SCHEME).partition("@")
        parts = place.rstrip("/").split("/")
        wrong = not text.startswith(SCHEME) or len(parts) < 2 or (bool(at) and not revision)
        if wrong or not all(map(_PART.fullmatch, [*parts, *(revision.split("/") if at else [])])):
            raise UsageError(f"{quoted(text)} is not an address on the Hub; write {_FORM}.")
        return cls("/".join(parts[:2]), "/".join(parts[2:]), revision or None)

    def __str__(self) -> str:
        inside = f"/{self.inside}" if self.inside else ""
        return f"{SCHEME}{self.repo}{inside}{f'@{self.revision}' if self.revision else ''}"

    @property
    def is_file(self) -> bool:
        """Told by the suffix, so that nothing has to be asked."""
        return self.inside.endswith((shards.SUFFIX, ".gguf", *shards.PICKLES))


def fetch(text: str) -> Path:
    """The file or index to open, downloaded into Hugging Face's own cache if it is not there.

    Of a folder only what the model needs is downloaded: one file, or the index and its shards, and config.json.
    With ``HF_HUB_OFFLINE=1``, or when the Hub cannot be reached, the cache alone is used. Raises UsageError for
    a malformed or ambiguous address, InputMissing with the reason when the model cannot be had, DataError for
    pickles and GGUF, before they are downloaded.
    """
    address = HubAddress.parse(text)
    if address.is_file and not address.inside.endswith(shards.SUFFIX):
        kind = (
            "a GGUF file, which this version does not support yet" if address.inside.endswith(".gguf") else "a pickle"
        )
        raise DataError(f'"{address}" is {kind}; name the .safetensors file of the model.')
    try:
        return _fetch_file(address, address.inside) if address.is_file else _fetch_folder(address)
    except MergetoolError:
        raise
    # The Hub's client raises what its HTTP library raises, and that has been requests, httpx and a fork of it.
    except Exception as error:
        _explain(error, address)


def _fetch_file(address: HubAddress, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    path = hf_hub_download(
        address.repo, name, revision=address.revision, cache_dir=_cache(), local_files_only=_is_offline()
    )
    return Path(path)


def _fetch_folder(address: HubAddress) -> Path:
    from huggingface_hub import HfApi, errors

    refused: Exception | None = None
    if not _is_offline():
        try:
            listed = list(HfApi().list_repo_files(address.repo, revision=address.revision))
        except Exception as error:  # see fetch; what the cache has may do, as in the Hub's own functions
            refused = error
        else:
            return _download_folder(address, listed)
    try:
        return shards.choose(_snapshot(address, [], offline=True) / address.inside)
    except (errors.LocalEntryNotFoundError, InputMissing) as missing:
        if isinstance(refused, errors.HfHubHTTPError | errors.HFValidationError):
            raise refused from None
        raise errors.LocalEntryNotFoundError(str(missing)) from None


def _download_folder(address: HubAddress, listed: list[str]) -> Path:
    inside = address.inside
    names = _children(listed, inside)
    parts = shards.denoisers(_folders(listed, inside)) if shards.is_pipeline(names) else []
    if parts:
        part = shards.one_denoiser(parts, str(address))
        inside = f"{inside}/{part}" if inside else part
        names = _children(listed, inside)
    chosen = shards.pick(names, str(address))
    prefix = f"{inside}/" if inside else ""
    wanted = [chosen, *(name for name in names if name == "config.json")]
    if shards.is_index(chosen):
        with InputFile.open(_fetch_file(address, prefix + chosen)) as file:
            shards.require_index_size(file.size, str(address))
            wanted += ShardIndex.parse(file.read(0, file.size), source=f"{address}/{chosen}").shards
    return _snapshot(address, [prefix + name for name in wanted], offline=False) / inside / chosen


def _children(listed: list[str], folder: str) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    below = (name.removeprefix(prefix) for name in listed if name.startswith(prefix))
    return sorted(name for name in below if "/" not in name and not name.startswith("."))


def _folders(listed: list[str], folder: str) -> set[str]:
    prefix = f"{folder}/" if folder else ""
    below = (name.removeprefix(prefix) for name in listed if name.startswith(prefix))
    return {name.partition("/")[0] for name in below if "/" in name}


def _snapshot(address: HubAddress, wanted: list[str], *, offline: bool) -> Path:
    """The folder of the revision in the cache, with the files ``wanted`` in it.

    Offline nothing is asked for: an incomplete snapshot may still hold this model, as its files will tell.
    """
    from huggingface_hub import snapshot_download

    path = snapshot_download(
        address.repo,
        revision=address.revision,
        cache_dir=_cache(),
        local_files_only=offline,
        allow_patterns=[glob.escape(name) for name in wanted],
    )
    return Path(path)


def _is_offline() -> bool:
    """As huggingface_hub reads it, which does so only once, when it is imported."""
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE)


def _cache() -> str | None:
    return os.environ.get("HF_HUB_CACHE") or None


def _explain(error: Exception, address: HubAddress) -> NoReturn:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        reason = "its owner asks for consent: accept it on its page, then run: hf auth login"
    elif isinstance(error, errors.RepositoryNotFoundError):
        reason = "there is no such repository, or it is private; check the spelling, or run: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        reason = "it has no such revision; check the part after @"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        asked = f"{_OFFLINE[0]} is set" if _is_offline() else "the Hub cannot be reached"
        reason = f"it is not in the cache, and {asked}; download it once while online"
    elif isinstance(error, errors.EntryNotFoundError):
        reason = "the repository has no such file; look at its file list"
    else:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}; try again later"
    raise InputMissing(f'"{address}" cannot be had: {reason}.') from error
