"""Room for outputs, downloads and temporary files, and the file of names."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mergetool import models
from mergetool.checkpoint import system
from mergetool.errors import MergetoolError
from mergetool.installation.diagnosis import Diagnosis

ONE_MODEL = 13_000_000_000
"""Bytes of a model in bf16, as Z-Image is; with less room its merge does not fit."""


def diagnose() -> list[Diagnosis]:
    """A line for the working folder, for Hugging Face's cache, and for temporary files."""
    return [_working_folder(), _room("downloads", _hub_cache()), _temporary()]


def names_file() -> Diagnosis:
    """The file that keeps names of models, and whether it can be read."""
    path = models.names_file()
    facts = {"file": str(path)}
    try:
        count = len(models.names_in(path))
    except (MergetoolError, OSError) as error:
        return Diagnosis(
            "names", "problem", f"{path} cannot be read ({error})", "mend the file, or move it away", facts
        )
    holder = _nearest(path.parent)
    said = f"{path}, {count} name{'' if count == 1 else 's'}" if path.exists() else f"{path}, not there yet"
    if holder is None or not os.access(holder, os.W_OK):
        return Diagnosis(
            "names",
            "note",
            f"{said}; its folder cannot be written",
            "set MERGETOOL_CONFIG_DIR to a folder of yours",
            facts,
        )
    return Diagnosis("names", "ok", said, facts=facts)


def _working_folder() -> Diagnosis:
    try:
        return _room("outputs", Path.cwd())
    except OSError:
        return Diagnosis("outputs", "note", "the working folder is gone", "change to a folder that is there")


def _temporary() -> Diagnosis:
    try:
        return _room("temporary", Path(tempfile.gettempdir()))
    except OSError:
        return Diagnosis(
            "temporary", "problem", "no folder for temporary files can be written", "set TMPDIR to a folder of yours"
        )


def _hub_cache() -> Path:
    """Where the Hub's client keeps models, by the variables that it reads."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"])
    if os.environ.get("HF_HOME"):
        return Path(os.environ["HF_HOME"]) / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "huggingface" / "hub"


def _room(topic: str, folder: Path) -> Diagnosis:
    holder = _nearest(folder)
    free = None if holder is None else _free(holder)
    facts = {"folder": str(folder), "free": free, "writable": holder is not None and os.access(holder, os.W_OK)}
    if not facts["writable"]:
        return Diagnosis(
            topic, "note", f"{folder} cannot be written", "choose another folder, or its permissions", facts
        )
    if free is None:
        return Diagnosis(topic, "note", f"{folder}, which does not say how much is free", facts=facts)
    said = f"{folder}, {free / 1e9:.1f} GB free"
    if topic != "temporary" and free < ONE_MODEL:
        return Diagnosis(
            topic,
            "note",
            f"{said}: a model of {ONE_MODEL / 1e9:.0f} GB does not fit",
            "free some space, or use another disk",
            facts,
        )
    return Diagnosis(topic, "ok", said, facts=facts)


def _nearest(folder: Path) -> Path | None:
    """The folder, or the nearest one above it that is there."""
    for place in (folder, *folder.parents):
        try:
            if place.is_dir():
                return place
        except OSError:
            continue
    return None


def _free(folder: Path) -> int | None:
    try:
        return system.free_space(folder)
    except OSError:
        return None
