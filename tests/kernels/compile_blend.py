"""Compile the merge kernel for GPUs that are not here, and print what became of it; a program of its own, since Triton
either interprets or compiles in a process."""

from __future__ import annotations

import json
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mergetool_kernels.blend import blend_kernel

POINTERS = {0: "*fp32", 1: "*i16", 2: "*i16", 3: "*u8", 4: "*u8", 5: "*fp64"}
BRIDGE = ((0, 0, 0), (0, 1, 1), (0, 2, 2), (3, 1, 2), (1, 1, 0), (2, 0, 1))


def compiled(kind: int, *, native: bool, capability: int) -> dict[str, int]:
    """The kernel of a counted bridge merge of one stored type: what its code loads and computes with."""
    constants = {
        "PROGRAM": BRIDGE, "KINDS": (kind,) * 3, "SCALED": (0,) * 3, "COLUMNS": (0,) * 3, "GROUPS": (0,) * 3,
        "OUT": kind, "OUT_SCALED": 0, "OUT_COLUMNS": 0, "ROUNDING": 1, "BASE": 0, "COUNT": True, "NATIVE": native,
        "EVEN": True, "BLOCK": 1024, "TILES": 4,
    }  # fmt: skip
    types = {
        "values": (POINTERS[kind],) * 3, "scales": ("*fp32",) * 3, "factors": ("fp32",), "out": POINTERS[kind],
        "inverse_scale": "*fp32", "counts": "*i32", "sums": "*fp64", "key0": "i32", "key1": "i32", "first": "i64",
        "n": "i64",
    }  # fmt: skip
    signature = {name: types.get(name, "constexpr") for name in blend_kernel.arg_names}
    aligned = {}
    for place, name in enumerate(blend_kernel.arg_names):
        if name == "values":
            aligned |= {(place, i): [["tt.divisibility", 16]] for i in range(3)}
        elif name in ("out", "n"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(blend_kernel, signature, constants, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
    return {
        "contracted": len(re.findall(r"\bfma\.rn\.f32", code)),
        "wide loads": len(re.findall(r"ld\.global[.\w:]*\.v[24]", code)),
        "not saturating": len(re.findall(r"cvt\.rn\.(?!satfinite)[.\w]*e[45]m[23]x2\.f32", code)),
        "flushing": len(re.findall(r"(?:mul|add|sub)[.\w]*ftz", code)),
    }


if __name__ == "__main__":
    print(json.dumps(compiled(int(sys.argv[1]), native=sys.argv[2] == "native", capability=int(sys.argv[3]))))
