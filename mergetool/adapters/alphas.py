"""Alphas outside the tensors: PEFT's adapter_config.json, and JSON in diffusers' headers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergetool.checkpoint import strict_json
from mergetool.checkpoint.inputs import InputFile
from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.errors import DataError
from mergetool.quant.encoding import SCALE_DTYPES, floats

CONFIG = "adapter_config.json"
HEADER = "lora_adapter_metadata"
"""The entry of a header in which diffusers keeps the config of an adapter, by component."""

MAX_CONFIG = 1_000_000


@dataclass(frozen=True, slots=True)
class Alphas:
    """The alphas of a config: one for all, others by module, and whether rsLoRA applies.

    In rsLoRA the root of the rank divides them.
    """

    everywhere: float | None = None
    by_module: Mapping[str, float] = field(default_factory=dict)
    rank_stabilised: bool = False

    def alpha(self, module: str, rank: int | None) -> float | None:
        """The alpha of a module; None without a statement.

        Of PEFT's patterns the first counts; they are ends of names, or with ``^`` whole ones.
        """
        for pattern, alpha in self.by_module.items():
            if module == pattern.removeprefix("^") or module.endswith("." + pattern):
                return alpha
        return self.everywhere

    def scale(self, alpha: float, rank: int) -> float:
        """The factor of the product of ``up`` and ``down``."""
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank


def stated(file: Path, metadata: Mapping[str, str]) -> Alphas:
    """The alphas of the config beside ``file``, else of its header. Raises DataError for JSON that cannot be read."""
    beside = file.parent / CONFIG
    if file.name == "adapter_model.safetensors" and os.path.lexists(beside):
        with InputFile.open(beside) as config:
            if config.size > MAX_CONFIG:
                raise DataError(f'"{beside}" has {config.size} bytes, but the limit is {MAX_CONFIG}; move it away.')
            return _alphas(config.read(0, config.size), str(beside))
    return in_header(metadata, str(file)) or Alphas()


def in_header(metadata: Mapping[str, str], source: str) -> Alphas | None:
    """The alphas of a header; None where it has none. Raises DataError for JSON that cannot be read."""
    text = metadata.get(HEADER)
    return _alphas(text.encode(), f"{source}: {HEADER}") if text else None


def read(checkpoint: Checkpoint, key: str) -> float:
    """The value of an ``.alpha`` tensor. Raises DataError for anything but one finite float."""
    info = checkpoint.tensors[key]
    value = math.nan
    if info.dtype in SCALE_DTYPES and math.prod(info.shape) == 1:
        value = float(floats(memoryview(checkpoint.read(key)), info.dtype)[0])
    elif info.dtype.code in ("F64", "I64", "I32") and math.prod(info.shape) == 1:
        value = float(
            np.frombuffer(checkpoint.read(key), {"F64": "<f8", "I64": "<i8", "I32": "<i4"}[info.dtype.code])[0]
        )
    if not math.isfinite(value):
        raise DataError(f'"{checkpoint.source}": {quoted(key)} is not one finite number; the file is damaged.')
    return value


def _alphas(raw: bytes, source: str) -> Alphas:
    try:
        config = strict_json.loads(raw)
    except ValueError as error:
        raise DataError(f'"{source}" has {error}; get the file again.') from None
    if not isinstance(config, dict):
        raise DataError(f'"{source}" is not a JSON object; get the file again.')
    # diffusers writes "transformer.lora_alpha" or "unet.lora_alpha" for every component in one object
    plain = {name.removeprefix("transformer.").removeprefix("unet."): value for name, value in config.items()}
    pattern = plain.get("alpha_pattern")
    by_module = {
        name.removesuffix("$").replace("\\.", "."): float(value)
        for name, value in (pattern.items() if isinstance(pattern, dict) else ())
        if _is_number(value)
    }
    alpha: Any = plain.get("lora_alpha")
    return Alphas(float(alpha) if _is_number(alpha) else None, by_module, plain.get("use_rslora") is True)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
