"""Nodes that compute with models. They write an expression and read no file; a Save node does all of it in one pass."""

from __future__ import annotations

from typing import Any, Literal

from mergetool.comfyui import host, links
from mergetool.comfyui.sources import CATEGORY
from mergetool.recipe.expression import parse

MULTIPLIER = (
    "FLOAT",
    # Without "round" ComfyUI's page rounds what is typed to the step: 171.15 would be 171.2.
    {
        "default": 1.0,
        "min": -1e6,
        "max": 1e6,
        "step": 0.1,
        "round": False,
        "tooltip": "Any number; 171.1 was once needed.",
    },
)
SLOTS = ("a", "b", "c", "d")


class SubtractNode:
    """``multiplier * (a - b)``, in float32, before anything is added."""

    CATEGORY = CATEGORY
    DESCRIPTION = "multiplier * (a - b): what a learned beyond b. Nothing is computed until you save."
    RETURN_TYPES = (links.DELTA,)
    RETURN_NAMES = ("delta",)
    FUNCTION = "subtract"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Two models and a number."""
        return {"required": {"a": (links.MODEL, {}), "b": (links.MODEL, {}), "multiplier": MULTIPLIER}}

    @host.computing
    def subtract(self, a: str, b: str, multiplier: float) -> tuple[str]:
        """The difference as an expression."""
        return (links.difference(a, b, multiplier),)


class AddNode:
    """``model + multiplier * delta``."""

    CATEGORY = CATEGORY
    DESCRIPTION = "model + multiplier * delta. Nothing is computed until you save."
    RETURN_TYPES = (links.MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """A model, a difference and a number."""
        return {"required": {"model": (links.MODEL, {}), "delta": (links.DELTA, {}), "multiplier": MULTIPLIER}}

    @host.computing
    def add(self, model: str, delta: str, multiplier: float) -> tuple[str]:
        """The sum as an expression."""
        return (links.total(model, delta, multiplier),)


class MergeExpressionNode:
    """Takes any expression of the command line over the linked models a to d."""

    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Any merge that you can type for mergetool, as in: a + 20 * (b - c). The linked models are a, b, c and d; registered names, "
        "quoted paths and merge methods work too. The anchor gives the output its names, dtypes and protected tensors."
    )
    RETURN_TYPES = (links.MODEL,)
    RETURN_NAMES = ("model",)
    FUNCTION = "merge"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The text, and a link for each of its names."""
        return {
            "required": {"expression": ("STRING", {"default": "a + 20 * (b - c)", "multiline": True})},
            "optional": {slot: (links.MODEL, {}) for slot in SLOTS},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, expression: str | None) -> Literal[True] | str:
        """True, or why the text is no merge, before anything runs. None is a linked text, not known yet."""
        return host.first_error(lambda: parse("a" if expression is None else expression))

    @host.computing
    def merge(self, expression: str, **inputs: str) -> tuple[str]:
        """The expression with the linked models in it; raises ExpressionError when it is no merge."""
        return (parse(links.filled(expression, inputs)).text,)
