"""Small Z-Image checkpoints for tests: real names, real layouts, weights that are a function of the seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.generate import SIZES, Spec, generate
from benchmarks.values import Delta
from mergetool.checkpoint.dtypes import BF16, DType

TINY = SIZES["tiny"]


def checkpoint(
    path: Path,
    *,
    variant: int | None = None,
    layout: str = "comfyui",
    dtype: DType = BF16,
    prefix: str = "",
    shard_size: int | None = None,
    config: dict[str, Any] | None = None,
    relative: float = 0.05,
    rank: int = 4,
    uneven: float = 0.0,
) -> Path:
    """One checkpoint at ``path``: the common base, or with ``variant`` a fine-tune of it with that seed."""
    delta = (
        None
        if variant is None
        else Delta(seed=variant, rank=rank, decay=0.7, relative=relative, noise=0.05, uneven=uneven)
    )
    spec = Spec(
        config=config or TINY, layout=layout, dtype=dtype, prefix=prefix, shard_size=shard_size, delta=delta, seed=3
    )
    generate(path, spec, threads=1)
    return path
