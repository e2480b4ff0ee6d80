"""Quantised layers that other libraries made, with the values that they decode themselves: made once, in a process of their own.

diffusers and PEFT change what they do where these libraries are installed, so they are in no environment of ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.oracles.fetching import fetched, pip_target

PACKAGES = ["bitsandbytes==0.50.2", "sdnq==0.2.8"]
SHAPES = [(64, 128), (17, 31), (100, 300), (129, 770)]

CASES: dict[str, dict[str, Any]] = {
    **{
        f"bitsandbytes {kind}{' nested' * nested} by {block} of {shape}": {
            "by": "bitsandbytes_4bit",
            "shape": shape,
            "how": {"quant_type": kind, "compress_statistics": nested, "blocksize": block},
        }
        for kind in ("nf4", "fp4")
        for nested in (False, True)
        for block, shapes in ((64, SHAPES), (4096, [(17, 31), (129, 770)]))
        for shape in shapes
    },
    **{f"bitsandbytes int8 of {shape}": {"by": "bitsandbytes_int8", "shape": shape, "how": {}} for shape in SHAPES},
    **{
        f"SDNQ {' '.join(map(str, how.values()))} of {shape}": {"by": "sdnq", "shape": shape, "how": how}
        for kind in ("int8", "uint8", "int4", "uint4")
        for how in (
            {"weights_dtype": kind},
            {"weights_dtype": kind, "group_size": 32},
            {"weights_dtype": kind, "use_svd": True, "svd_rank": 8},
        )
        for shape in ((64, 128), (100, 320))
    },
}
"""What is asked of ``quantisers_maker``: the function ``by``, the weight's shape, and arguments."""


def made() -> Path:
    """The folder with two files a case, by its number: the tensors of layer ``a`` as they are saved, and ``value``, what the library reads in them."""
    maker = Path(__file__).with_name("quantisers_maker.py")

    def make(target: Path) -> None:
        target.mkdir(parents=True)
        packages = pip_target("quantisers", PACKAGES)
        root = Path(__file__).parents[2]
        environment = {**os.environ, "PYTHONPATH": f"{packages}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.oracles.quantisers_maker", str(target)]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return fetched("quantised", json.dumps([PACKAGES, CASES, maker.read_text("utf-8")]), make)
