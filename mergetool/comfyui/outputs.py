"""Nodes that write files in ComfyUI's folders, complete or not at all. They replace nothing unless asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergetool.api.differences import Diff, run_diff
from mergetool.api.merges import Merge, run_merge
from mergetool.comfyui import host, links, widgets
from mergetool.comfyui.report import ExtractEvents, SaveEvents
from mergetool.comfyui.sources import CATEGORY
from mergetool.options.kinds import sentence
from mergetool.recipe.quotes import quote

if TYPE_CHECKING:
    from mergetool.checkpoint.outputs import Target

NAME = ("STRING", {"default": "", "placeholder": "NAME.safetensors", "tooltip": "Its name in that folder."})


class SaveNode:
    """A merge, streamed into a checkpoint."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Merge and write a checkpoint, in one pass over the files. A file that was made from the same inputs in the same way stays."
    RETURN_TYPES = (links.MODEL, "STRING", "STRING")
    RETURN_NAMES = ("model", "path", "report")
    FUNCTION = "save"
    OUTPUT_NODE = True
    FOLDERS = (host.MODELS, host.OUTPUT)
    DAILY = ("protect", "multipliers", "dtype", "quant", "layout", "rounding", "seed", "overwrite", "force")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs: the model, the target and the form of the output."""
        own = {"output": NAME, "folder": (list(cls.FOLDERS), {})}
        return widgets.inputs(Merge, linked=["keep_from"], daily=cls.DAILY, own=own)  # type: ignore[no-any-return]

    @classmethod
    def VALIDATE_INPUTS(cls, **held: Any) -> Literal[True] | str:
        """True, or the error in a value or a name, before anything runs."""
        return host.first_error(lambda: _target(cls.FOLDERS, held), lambda: widgets.check(Merge, held))

    @classmethod
    def IS_CHANGED(cls, **held: Any) -> float | str:
        """Changed always while the file is absent, so that a deleted one is made again."""
        return "there" if _target(cls.FOLDERS, held).path.exists() else float("nan")

    @host.computing
    def save(self, **held: Any) -> dict[str, Any]:
        """Write the merge. Returns its path as a model, and as text, and a report. Raises MergetoolError."""
        keep_from = held.get("keep_from")
        if keep_from:
            held["keep_from"] = links.argument(keep_from)
        target = _target(self.FOLDERS, held)
        host.make_folder(target.path)
        shown = SaveEvents()
        run_merge(widgets.request(Merge, held | {"output": _typed(target)}), shown, keeps_current=True)
        path = str(target.path)
        return {"ui": {"text": [shown.text]}, "result": (quote(str(target.path.absolute())), path, shown.text)}


class ExtractLoraNode:
    """The difference of two checkpoints as a LoRA."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "variant - base as a LoRA. A merge that is linked need not be saved. "
        "A file that was made from the same inputs in the same way stays."
    )
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("path", "report")
    FUNCTION = "extract"
    OUTPUT_NODE = True
    FOLDERS = (host.LORAS, host.OUTPUT)
    LINKED = ("base", "variant", "variant2")
    DAILY = ("rank", "rank_thresh", "rank_max", "rule", "exclude", "dtype", "overwrite")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Two models, and how much of their difference to keep."""
        own = {"output": NAME, "folder": (list(cls.FOLDERS), {})}
        return widgets.inputs(Diff, linked=["variant2"], daily=cls.DAILY, own=own)  # type: ignore[no-any-return]

    @classmethod
    def VALIDATE_INPUTS(cls, **held: Any) -> Literal[True] | str:
        """Validate as Save does."""
        return host.first_error(lambda: _target(cls.FOLDERS, held), lambda: widgets.check(Diff, held))

    @classmethod
    def IS_CHANGED(cls, **held: Any) -> float | str:
        """Tell changes as Save does."""
        return "there" if _target(cls.FOLDERS, held).path.exists() else float("nan")

    @host.computing
    def extract(self, **held: Any) -> dict[str, Any]:
        """Write the LoRA. Returns its path and a report of its contents. Raises MergetoolError."""
        named = {name: links.argument(held[name]) for name in self.LINKED if held.get(name)}
        target = _target(self.FOLDERS, held)
        host.make_folder(target.path)
        shown = ExtractEvents()
        run_diff(widgets.request(Diff, held | named | {"output": _typed(target)}), shown, keeps_current=True)
        return {"ui": {"text": [shown.text]}, "result": (str(target.path), shown.text)}


def _target(folders: Sequence[str], held: dict[str, Any]) -> Target:
    """The target of a node's file or folder; a linked name is None, and may be any. Raises UsageError."""
    folder = held.get("folder") or host.OUTPUT
    if folder not in folders:
        raise sentence("folder", folder, f"one of {', '.join(folders)}")
    is_folder = held.get("layout") == "diffusers" or bool(held.get("shard_size"))
    name = held.get("output")
    return host.target(folder, widgets.LINKED if name is None else name, folder=is_folder)


def _typed(target: Target) -> str:
    return f"{target.path}{'/' if target.is_folder else ''}"
