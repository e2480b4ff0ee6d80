"""Models on the Hugging Face Hub: an ``hf://`` address becomes a path in its cache.

An address is ``hf://ORG/REPO[/FOLDER or FILE][@REVISION]``.
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote

from mergetool.checkpoint import shards
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.shards import ShardIndex
from mergetool.errors import DataError, InputMissing, MergetoolError, UsageError

SCHEME = "hf://"

_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_FORM = "hf://org/repo, hf://org/repo/folder or hf://org/repo/folder/file.safetensors, each with @revision at will"
_PAGE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co|hf-mirror\.com)/(?P<org>[^/?#]+)/(?P<repo>[^/?#]+)"
    r"(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/?#]+)(?:/(?P<inside>[^?#]*))?)?/?(?:[?#].*)?",
    re.IGNORECASE,
)
_NO_MODELS = ("api", "blog", "collections", "datasets", "docs", "learn", "papers", "settings", "spaces")
_WEB = re.compile(r"https?://|(?:www\.)?(?:civitai\.com|huggingface\.co|hf\.co|modelscope\.cn)/", re.IGNORECASE)
_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._ +()-]+")


@dataclass(frozen=True)
class HubAddress:
    """The address of a model on the Hub.

    It is a repository (``org/repo``), a folder or file inside it ("" for its root), and a revision (None for main).
    """

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
        """Whether the address is of a file. Its suffix tells, without the network."""
        return self.inside.lower().endswith((shards.SUFFIX, ".sft", ".gguf", *shards.PICKLES))


def address_of(text: str) -> str | None:
    """The ``hf://`` address of a Hub page or download; None for another text.

    Raises UsageError for other web pages, which say where a file can be had but are none.

    Example: ``address_of("https://huggingface.co/org/repo/blob/main/x.safetensors")`` is ``hf://org/repo/x.safetensors``.
    """
    page = _PAGE.fullmatch(text)
    if page is not None and page["org"] not in _NO_MODELS:
        repo, revision, inside = (unquote(page[name] or "") for name in ("repo", "revision", "inside"))
        inside = f"/{inside}" if inside else ""
        at = f"@{revision}" if revision not in ("", "main") else ""
        return f"{SCHEME}{page['org']}/{repo}{inside.rstrip('/')}{at}"
    if _WEB.match(text):
        raise UsageError(
            f"{quoted(text)} is a web page or a download, not a file; download the model and name the file, "
            "or give the address of its page on huggingface.co."
        )
    return None


def fetch(text: str) -> Path:
    """Download the file or index to open into Hugging Face's own cache.

    What is there already is not downloaded again.

    Of a folder only what the model needs is downloaded: one file, or the index and its shards, and config.json.
    With ``HF_HUB_OFFLINE=1``, or when the Hub cannot be reached, the cache alone is used. Raises UsageError for
    a malformed or ambiguous address, InputMissing with the reason when the model cannot be had, DataError for
    pickles, before they are downloaded.
    """
    address = HubAddress.parse(text)
    if address.inside.lower().endswith(shards.PICKLES):
        raise DataError(f'"{address}" is a pickle; name the .safetensors file of the model.')
    try:
        if shards.is_index(address.inside):
            return _fetch_shards(address, address.inside)
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
    chosen = f"{inside}/{chosen}" if inside else chosen
    if shards.is_index(chosen):
        return _fetch_shards(address, chosen)
    return _snapshot(address, [chosen, _beside(chosen, "config.json")], offline=False) / chosen


def _fetch_shards(address: HubAddress, index: str) -> Path:
    """The path of an index, with the shards that it names and the config beside it."""
    with InputFile.open(_fetch_file(address, index)) as file:
        shards.require_index_size(file.size, str(address))
        names = ShardIndex.parse(file.read(0, file.size), source=f"{SCHEME}{address.repo}/{index}").shards
    wanted = [index, *(_beside(index, name) for name in ("config.json", *names))]
    return _snapshot(address, wanted, offline=_is_offline()) / index


def _beside(file: str, name: str) -> str:
    folder = file.rpartition("/")[0]
    return f"{folder}/{name}" if folder else name


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
    """Whether huggingface_hub is offline; it reads that only once, when it is imported."""
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
