"""ComfyUI's services for nodes, and their stand-ins where ComfyUI is not running.

ComfyUI has imported ``folder_paths``, ``comfy.utils`` and ``comfy.model_management`` before it loads a custom node; they are taken from
there and never imported, since other packages may have the same names.
"""

from __future__ import annotations

import functools
import ntpath
import posixpath
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from mergetool import packages
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.outputs import Target, named
from mergetool.errors import InputMissing, MergetoolError, OutputError, UsageError
from mergetool.options import table

MODELS = "diffusion_models"
LORAS = "loras"
OUTPUT = "output"

_READ = (".safetensors", ".sft", ".gguf")

P = ParamSpec("P")
R = TypeVar("R")


def files_input(kind: str) -> tuple[Any, dict[str, Any]]:
    """The type of an input that names a file in ComfyUI's folders.

    It is a list to choose from, or text without ComfyUI.
    """
    folders = sys.modules.get("folder_paths")
    if folders is None:
        return "STRING", {"default": ""}
    return [name for name in folders.get_filename_list(kind) if name.lower().endswith(_READ)], {}


def file(kind: str, name: str) -> Path:
    """The path of a file as ``files_input`` names it. Raises InputMissing."""
    folders = sys.modules.get("folder_paths")
    path = folders.get_full_path(kind, name) if folders is not None else name
    if not path:
        raise InputMissing(
            f'"{name}" is in none of ComfyUI\'s folders for {kind}; reload the page to see which files there are.'
        )
    return Path(path)


def inside(kind: str, name: str) -> Path:
    """The path of ``name`` in ComfyUI's folder, or in the working folder without ComfyUI.

    Raises UsageError for a name that leads out of that folder: workflows come from strangers.
    """
    parts = name.replace("\\", "/").removesuffix("/").split("/")
    leads_out = posixpath.isabs(name) or ntpath.isabs(name) or bool(ntpath.splitdrive(name)[0])
    if leads_out or ".." in parts or not name.isprintable() or not parts[-1].strip(". "):
        raise UsageError(
            f"{quoted(name)} is not a name inside one of ComfyUI's folders; give one such as merged.safetensors or styles/merged.safetensors."
        )
    return _folder(kind) / "/".join(parts)


def target(kind: str, name: str, *, folder: bool = False) -> Target:
    """The target called ``name`` in that folder.

    It is a folder with a slash at its end, or where a ``folder`` is asked for, otherwise a file. Raises UsageError.
    """
    slash = "/" if name.endswith(("/", "\\")) else ""
    return named(f"{inside(kind, name)}{slash}", folder=folder)


def first_error(*checks: Callable[[], object]) -> Literal[True] | str:
    """True when no check raises a MergetoolError, else its sentence. VALIDATE_INPUTS answers with it."""
    try:
        for check in checks:
            check()
    except MergetoolError as error:
        return spelled(str(error))
    return True


def make_folder(path: Path) -> None:
    """The folder that a target is in, with those above it. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f'the folder "{path.parent}" cannot be made ({error.strerror}); choose another name.'
        ) from None


def progress() -> Callable[[int, int], None]:
    """Make a function of done and total that moves ComfyUI's progress bar.

    It raises when the user pressed cancel.
    """
    utils, management = sys.modules.get("comfy.utils"), sys.modules.get("comfy.model_management")
    bar = utils.ProgressBar(1) if utils is not None else None

    def report(done: int, total: int) -> None:
        if bar is not None:
            bar.update_absolute(done, total)
        if management is not None:
            management.throw_exception_if_processing_interrupted()

    return report


def computing(run: Callable[P, R]) -> Callable[P, R]:
    """A node's function as ComfyUI may call it.

    ComfyUI runs nodes in torch's inference mode, whose tensors other threads may not write to: it is off. It shows an error's text and
    its frames at the node: the text calls options as nodes do, and the frames inside mergetool are left out.
    """

    @functools.wraps(run)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            with packages.told():
                import torch

                with torch.inference_mode(False):
                    return run(*args, **kwargs)
        except MergetoolError as error:
            error.args = (spelled(str(error)),)
            raise error.with_traceback(None) from None

    return called


def spelled(sentence: str) -> str:
    """A sentence about options as one about a node's inputs, which have their names."""
    return table.spelled(sentence, lambda name, value: name if value is None else f"{name} {value}")


def _folder(kind: str) -> Path:
    folders = sys.modules.get("folder_paths")
    if folders is None:
        return Path()
    if kind == OUTPUT:
        return Path(folders.get_output_directory())
    places = [Path(place) for place in folders.get_folder_paths(kind)]
    # "diffusion_models" is also read from models/unet, which comes first and is the old name.
    return next((place for place in places if place.name == kind), places[0])
