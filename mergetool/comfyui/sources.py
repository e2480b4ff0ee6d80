"""Nodes that name a model."""

from __future__ import annotations

import os
from typing import Any

from mergetool import models
from mergetool.checkpoint.reader import Checkpoint
from mergetool.comfyui import host, links
from mergetool.recipe.quotes import quote

CATEGORY = "mergetool"


class ModelFileNode:
    """A checkpoint in ComfyUI's folder of diffusion models."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "A checkpoint in ComfyUI's folder of diffusion models. It is read while a node saves, never loaded whole."
    )
    RETURN_TYPES = (links.MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "name"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The file."""
        return {"required": {"file": host.files_input(host.MODELS)}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        """The content's fingerprint, sizes and times. Another file under the same name is another input."""
        return state(str(host.file(host.MODELS, file)))

    @host.computing
    def name(self, file: str) -> tuple[str]:
        """The file as an expression."""
        return (quote(str(host.file(host.MODELS, file).absolute())),)


class NamedModelNode:
    """A model as on the command line: a registered name, a path, hf:// or lab.NAME."""

    CATEGORY = CATEGORY
    DESCRIPTION = "A model by a registered name, the path of a file or folder, hf://org/repo, or lab.NAME."
    RETURN_TYPES = (links.MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "name"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The name."""
        return {"required": {"model": ("STRING", {"default": "lab.base"})}}

    @classmethod
    def IS_CHANGED(cls, model: str) -> str:
        """Tell changes as the node of a file does."""
        return state(model.strip())

    @host.computing
    def name(self, model: str) -> tuple[str]:
        """The model as an expression."""
        return (quote(models.resolve(model.strip()).name),)


class LoraFileNode:
    """A LoRA in ComfyUI's folder of LoRAs, as a difference."""

    CATEGORY = CATEGORY
    DESCRIPTION = "A LoRA in ComfyUI's folder, in any known spelling, as a difference. Link it to Add Difference; the multiplier there is its strength."
    RETURN_TYPES = (links.DELTA,)
    RETURN_NAMES = ("delta",)
    FUNCTION = "name"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The file."""
        return {"required": {"file": host.files_input(host.LORAS)}}

    @classmethod
    def IS_CHANGED(cls, file: str) -> str:
        """Tell changes as the node of a model does."""
        with Checkpoint.open(host.file(host.LORAS, file)) as stored:
            return _state(stored)

    @host.computing
    def name(self, file: str) -> tuple[str]:
        """The file as a term of an expression."""
        return (f"lora({quote(str(host.file(host.LORAS, file).absolute()))})",)


def state(model: str) -> str:
    """A value that changes when the content of ``model`` does. Raises what opening it raises."""
    with models.open_model(model, names_only=True) as opened:
        return _state(opened.checkpoint)


def _state(stored: Checkpoint) -> str:
    stats = [os.stat(file.path) for file in stored.files]
    return " ".join([stored.fingerprint(), *(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)])
