"""Decide by an output's name whether it is one file or a folder.

Every face that writes a model or a LoRA asks here, and nothing else decides it.

A name that ends in ``.safetensors`` or ``.sft``, in any case, is a file. A folder has a slash at its end, or is asked for in another way: by the
diffusers layout, by shards. Every other name gets ``.safetensors``, but for endings that say something else.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from mergetool.checkpoint import paths, system
from mergetool.checkpoint.names import quoted, why_not_on_windows
from mergetool.checkpoint.shards import PICKLES, SUFFIX, is_model_folder
from mergetool.checkpoint.targets import TargetKind
from mergetool.errors import OutputError, UsageError

ENDINGS = (SUFFIX, ".sft")
"""The ends of a safetensors file's name, in any case."""

_MISTYPED = (
    0.75  # how like ".safetensors" an ending is that was meant to be it: .safetensor, .saftensors, .safetensors1
)
_OTHERS = {
    ".gguf": "GGUF, which mergetool reads but does not write",
    **dict.fromkeys((*PICKLES, ".pt2", ".pkl"), "a pickle, which mergetool never writes"),
    **dict.fromkeys((".json", ".yaml", ".yml", ".toml", ".txt", ".csv", ".html"), "a text"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp"), "a picture"),
    **dict.fromkeys((".zip", ".tar", ".gz", ".7z"), "an archive"),
    **dict.fromkeys((".onnx", ".h5", ".msgpack", ".npz", ".engine"), "another format"),
}


@dataclass(frozen=True, slots=True)
class Target:
    """The path of an output, and whether it is a file or a folder.

    ``note`` is a sentence for the user where the name was completed, or is one that Windows cannot have, else empty.
    """

    path: Path
    kind: TargetKind
    note: str = ""

    def __str__(self) -> str:
        return f"folder {self.path}" if self.kind == "folder" else str(self.path)

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder of files."""
        return self.kind == "folder"


def model_target(
    name: str | os.PathLike[str] | Target,
    *,
    layout: str | None = None,
    shard_size: int | str | None = None,
    folder: bool = False,
    overwrite: bool = False,
) -> Target:
    """The target of a model called ``name``; a Target stays itself.

    It is a folder where the name ends in a slash, the ``layout`` that was asked for is diffusers, there is a ``shard_size``, a ``folder`` is asked for
    in another way, or the name is that of a model's folder and ``overwrite`` is set; else a file. Raises UsageError for an ending of another
    kind of file, and for one file that is to have shards; OutputError for the name of a folder.

    Example: ``model_target("zimage_v1.5").path`` is ``zimage_v1.5.safetensors``.
    """
    if isinstance(name, Target):
        target = name
    else:
        text = paths.typed(os.fspath(name))
        target = named(text, folder=folder or layout == "diffusers" or shard_size is not None)
        if overwrite and not target.is_folder and not is_file_name(text) and is_model_folder(Path(text)):
            return Target(Path(text), "folder")
        _require_no_folder(text, target)
    if shard_size is not None and not target.is_folder:
        raise UsageError(
            f'"{target.path}" names one file, but shards need a folder; leave out "{target.path.suffix}" or the shard size.'
        )
    return target


def lora_target(name: str | os.PathLike[str] | Target, *, folder: bool = False, role: str = "a LoRA") -> Target:
    """The target of a LoRA, or of ``role``, called ``name``.

    It is a file, or with ``folder`` a folder, as PEFT has it.

    Raises UsageError where the name says the opposite or has the ending of another kind of file, OutputError for the name of a folder.
    """
    if isinstance(name, Target):
        target = name
    else:
        text = paths.typed(os.fspath(name))
        target = named(text, folder=folder)
        _require_no_folder(text, target)
    if folder and not target.is_folder:
        raise UsageError(f'a PEFT adapter is a folder: name it "{target.path.with_suffix("")}".')
    if target.is_folder and not folder:
        raise UsageError(f'{role} is one file: name it "{target.path}{SUFFIX}".')
    return target


def named(text: str, *, folder: bool = False) -> Target:
    """The target that a name alone says, a folder where ``folder`` asks for one.

    Raises UsageError; looks at no disk.
    """
    path = Path(text)
    if "://" in text:
        raise UsageError(f'"{text}" is an address, but outputs are written to this machine; name a file.')
    if path.name in ("", "..") or path.name.lower() in ENDINGS:
        raise UsageError(f'"{text}" does not name an output; write a name such as "merged{SUFFIX}".')
    separators = tuple(filter(None, (os.sep, os.altsep)))
    has_slash = text.endswith((*separators, *(f"{separator}." for separator in separators)))
    if is_file_name(path):
        if has_slash:
            raise UsageError(f'"{text}" has a slash like a folder and the ending of a file; leave one of them out.')
        return Target(path, "file", _elsewhere(path))
    _check_ending(path)
    if has_slash or folder:
        return Target(path, "folder", _elsewhere(path))
    whole = path.with_name(path.name + SUFFIX)
    completed = f'the output is "{whole}": a name gets {SUFFIX} unless it ends in "{os.sep}", as a folder\'s does'
    return Target(whole, "file", "; ".join(filter(None, (completed, _elsewhere(whole)))))


def _elsewhere(path: Path) -> str:
    """A remark on a name that is good here and on no Windows; Windows refuses it when it is claimed."""
    reason = None if system.WINDOWS else why_not_on_windows(path.name)
    return f"Windows cannot have {quoted(path.name)}, because {reason}" if reason else ""


def is_file_name(name: str | os.PathLike[str]) -> bool:
    """Whether a name has the ending of a safetensors file."""
    return os.fspath(name).lower().endswith(ENDINGS)


def _require_no_folder(text: str, target: Target) -> None:
    path = Path(text)
    # What cannot be looked at is no folder here: the one who claims the target says why. Path.is_dir would raise.
    if not target.is_folder and os.path.isdir(path):
        file = path / f"merged{SUFFIX}"
        raise OutputError(
            f'"{path}" is a folder; name a file in it, such as "{file}", or a new folder with "{os.sep}" at its end.'
        )


def _check_ending(path: Path) -> None:
    ending = path.suffix.lower()
    if ending in _OTHERS:
        raise UsageError(f'"{path}" would be {_OTHERS[ending]}; name it "{path.with_suffix(SUFFIX)}".')
    if any(suffix.lower() in (*ENDINGS, *_OTHERS) for suffix in path.suffixes[:-1]):
        kept = Path(path.stem)
        while kept.suffix.lower() in (*ENDINGS, *_OTHERS):
            kept = Path(kept.stem)
        better = path.with_name(f"{kept}{path.suffix}{SUFFIX}")
        raise UsageError(
            f'"{path}" has "{path.suffix}" behind the ending of a model, so no program would load it; name it "{better}".'
        )
    if difflib.get_close_matches(ending, [SUFFIX], cutoff=_MISTYPED):
        raise UsageError(
            f'"{path}" ends in "{path.suffix}", which no program loads; name it "{path.with_suffix(SUFFIX)}".'
        )
