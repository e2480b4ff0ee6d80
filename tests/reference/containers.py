"""The table of quantised containers in docs/reference/quantised.md, from the register of containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mergetool.quant.quantiser import Quantiser
from mergetool.quant.register import every, quantisers

SHAPE = (256, 512)
"""Of the weight that stands for all: every block size divides it."""


KITCHEN = "comfy-kitchen, bit for bit"
ROTATED = "comfy-kitchen's codes in float64, rounded once"
PROOFS: Mapping[str, tuple[str, str, str]] = {
    "fp8-scaled": (KITCHEN, "comfy-kitchen's bytes", "yes"),
    "int8": (KITCHEN, "comfy-kitchen's bytes", "yes"),
    "int8-convrot": (ROTATED, "comfy-kitchen's but for ties", "yes"),
    "mxfp8": (KITCHEN, "comfy-kitchen's bytes but for its rounded logarithm", "yes"),
    "nvfp4": (KITCHEN, "comfy-kitchen's bytes", "yes"),
    "asym_w4a8_int8": (ROTATED, "-", "no"),
    "awq_w4a16": (KITCHEN, "-", "no"),
    "bitsandbytes": ("bitsandbytes' CPU kernels, bit for bit", "-", "no"),
    "convrot_w4a4": (f"{ROTATED}; ComfyUI to the roundings that it adds", "-", "yes"),
    "SDNQ": ("SDNQ, bit for bit; a low rank in float64, rounded once", "-", "no"),
    "svdquant_w4a4": ("float64, rounded once; comfy-kitchen to 2^-21 of the largest", "-", "no"),
}
"""What each container's reading and writing is held against, and whether ComfyUI 0.30.0 loads it; the tests in `tests/quant` and `tests/oracles` do it."""


def proofs() -> Iterator[str]:
    """A row for every container of the register. Raises KeyError for one that nothing is said of."""
    yield "| container | read as | written as | ComfyUI 0.30.0 loads it |"
    yield "|---|---|---|---|"
    for one in every():
        read, written, loads = PROOFS[one.title]
        yield f"| `{one.title}` | {read} | {written} | {loads} |"


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
