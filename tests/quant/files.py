"""Quantised files for tests: tensors that comfy-kitchen or ``gguf`` made, written by the safetensors library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from mergetool.checkpoint.reader import Checkpoint
from mergetool.quant.encoding import Encoding
from mergetool.quant.weights import quantised

SHAPES = [(192, 192), (170, 64), (64, 3840), (1, 16), (17, 31), (300, 100), (129, 257)]
"""Z-Image's kinds of sizes, and odd ones: ffn hidden widths that no block divides, one row, one more than a tile."""


def weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Float32 weights of a trained matrix's spread, with a few outliers and a block of zeros."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 0.02
    values[0, 0], values[-1, -1] = 0.7, -0.9
    if shape[1] >= 64:
        values[shape[0] // 2, :64] = 0
    return values


def marker(config: Mapping[str, Any]) -> torch.Tensor:
    """A ``.comfy_quant`` tensor."""
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def written(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=dict(metadata or {}))
    return path


def encodings(checkpoint: Checkpoint) -> Mapping[str, Encoding]:
    return quantised(checkpoint, "f").encodings


def values(path: Path, name: str = "a.weight", shape: tuple[int, ...] | None = None) -> np.ndarray:
    """The values of a quantised weight of a file, read in two pieces that no block ends between."""
    with Checkpoint.open(path) as checkpoint:
        encoding = encodings(checkpoint)[name]
        if shape is not None:
            assert encoding.fits(shape)
            encoding = encoding.cropped(shape)
        middle = encoding.rows // 3
        pieces = [encoding.values(checkpoint.read, 0, middle), encoding.values(checkpoint.read, middle)]
        return np.concatenate(pieces)
