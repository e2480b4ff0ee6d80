"""Kernels compile for GPUs that are not here, to code that keeps the promise of equal bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("kind", "formats", "capability"),
    [(2, "native", 90), (3, "native", 90), (4, "native", 90), (3, "integer", 80), (2, "integer", 75)],
    ids=["bf16 on Hopper", "e4m3 on Hopper", "e5m2 on Hopper", "e4m3 on Ampere", "bf16 on Turing"],
)
def test_the_merge_kernel_compiles_without_contraction(kind: int, formats: str, capability: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_blend", str(kind), formats, str(capability)],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["contracted"] == found["flushing"] == found["not saturating"] == 0
    assert found["wide loads"] >= 3
