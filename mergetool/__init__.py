"""Merge diffusion-transformer checkpoints and take difference LoRAs, streaming.

The library behind the command line. What is listed in ``__all__`` is public; nothing is imported before it is used, so
``import mergetool`` costs nothing and never loads torch by itself.

    with mergetool.open_merge("alkahest + 20 * (turbo - deturbo)", mergetool.Options(protect=("refiner",))) as plan:
        mergetool.run_merge(plan, Path("out.safetensors"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergetool.checkpoint.reader import Checkpoint
    from mergetool.checkpoint.writer import CheckpointWriter
    from mergetool.engine.job import open_merge, run_merge
    from mergetool.errors import MergetoolError
    from mergetool.lora.extract import extract, open_diff
    from mergetool.lora.pairs import DiffOptions
    from mergetool.models import open_model
    from mergetool.recipe.expression import parse
    from mergetool.recipe.options import Options

__version__ = "0.1.0"

__all__ = [
    "Checkpoint",
    "CheckpointWriter",
    "DiffOptions",
    "MergetoolError",
    "Options",
    "extract",
    "open_diff",
    "open_merge",
    "open_model",
    "parse",
    "run_merge",
]

_HOME = {
    "Checkpoint": "checkpoint.reader",
    "CheckpointWriter": "checkpoint.writer",
    "DiffOptions": "lora.pairs",
    "MergetoolError": "errors",
    "Options": "recipe.options",
    "extract": "lora.extract",
    "open_diff": "lora.extract",
    "open_merge": "engine.job",
    "open_model": "models",
    "parse": "recipe.expression",
    "run_merge": "engine.job",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"mergetool.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mergetool' has no attribute {name!r}")
