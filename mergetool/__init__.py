"""Merge diffusion-transformer checkpoints and take difference LoRAs, streaming.

The commands as functions: ``merge``, ``diff``, ``compare``, ``sample``, ``verify``, ``replay`` and ``Recipe`` (see ``mergetool.api``), and the library under
them: plans, options, checkpoints. What is listed in ``__all__`` is public; nothing is imported before it is used, so ``import mergetool`` costs nothing
and never loads torch by itself.

    import mergetool

    mergetool.merge("alkahest + 20 * (turbo - deturbo)", "out.safetensors", protect=["refiner"])

    with mergetool.open_merge("alkahest + 20 * (turbo - deturbo)", mergetool.MergeOptions(protect=("refiner",))) as plan:
        mergetool.run_merge(plan, Path("out.safetensors"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergetool.api.comparisons import compare
    from mergetool.api.differences import diff
    from mergetool.api.lora_checks import lora_inspect, lora_interference, lora_verify
    from mergetool.api.loras import (
        lora_common,
        lora_convert,
        lora_merge,
        lora_orthogonal,
        lora_resize,
    )
    from mergetool.api.merges import bake, convert, merge
    from mergetool.api.pictures import sample
    from mergetool.api.recipes import Recipe
    from mergetool.api.verifications import replay, verify
    from mergetool.checkpoint.reader import Checkpoint
    from mergetool.checkpoint.writer import CheckpointWriter
    from mergetool.difference.extract import extract, open_diff
    from mergetool.engine.inputs import open_model
    from mergetool.engine.job import open_merge, run_merge
    from mergetool.errors import MergetoolError
    from mergetool.options.differences import DiffOptions
    from mergetool.options.merging import MergeOptions
    from mergetool.recipe.expression import parse

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "DiffOptions",
    "MergeOptions",
    "MergetoolError",
    "Recipe",
    "bake",
    "compare",
    "convert",
    "diff",
    "extract",
    "lora_common",
    "lora_convert",
    "lora_inspect",
    "lora_interference",
    "lora_merge",
    "lora_orthogonal",
    "lora_resize",
    "lora_verify",
    "merge",
    "open_diff",
    "open_merge",
    "open_model",
    "parse",
    "replay",
    "run_merge",
    "sample",
    "verify",
]

_HOME = {
    "Checkpoint": "checkpoint.reader",
    "CheckpointWriter": "checkpoint.writer",
    "DiffOptions": "options.differences",
    "MergetoolError": "errors",
    "MergeOptions": "options.merging",
    "Recipe": "api.recipes",
    "bake": "api.merges",
    "compare": "api.comparisons",
    "convert": "api.merges",
    "diff": "api.differences",
    "extract": "difference.extract",
    "lora_common": "api.loras",
    "lora_convert": "api.loras",
    "lora_inspect": "api.lora_checks",
    "lora_interference": "api.lora_checks",
    "lora_merge": "api.loras",
    "lora_orthogonal": "api.loras",
    "lora_resize": "api.loras",
    "lora_verify": "api.lora_checks",
    "merge": "api.merges",
    "open_diff": "difference.extract",
    "open_merge": "engine.job",
    "open_model": "engine.inputs",
    "parse": "recipe.expression",
    "replay": "api.verifications",
    "run_merge": "engine.job",
    "sample": "api.pictures",
    "verify": "api.verifications",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from mergetool import packages

        with packages.told():
            return getattr(importlib.import_module(f"mergetool.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mergetool' has no attribute {name!r}")
