"""The table of quantised containers in docs/reference/quantised.md, from the register of containers."""

from __future__ import annotations

from collections.abc import Iterator

from mergetool.quant.quantiser import Quantiser
from mergetool.quant.register import quantisers

SHAPE = (256, 512)
"""Of the weight that stands for all: every block size divides it."""


def lines() -> Iterator[str]:
    """Each container: what files call it, and every tensor that a weight becomes."""
    rows, columns = SHAPE
    yield f"| `--quant` | in the file's markers | what a weight `X.weight` of [{rows}, {columns}] becomes | both sides padded to |"
    yield "|---|---|---|---|"
    for one in quantisers():
        formats = ", ".join(f"`{name}`" for name in one.formats)
        yield f"| `{one.quant}` | {formats} | {_tensors(one)} | {one.multiple if one.multiple > 1 else '-'} |"


def _tensors(one: Quantiser) -> str:
    entries = one.entries("X", SHAPE)
    return ", ".join(
        f"`{name}` {dtype.code} {list(shape)}" for name, dtype, shape in entries if "comfy_quant" not in name
    )
