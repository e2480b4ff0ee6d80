"""Build, check and time everything that runs on a GPU, in one call; a table at the end. Needs no network.

    python -m benchmarks.gpu [--size full] [--dir /dev/shm/models] [--results benchmarks/results.csv]

The contract tests on the device, the kernels against its copy, then merge and extraction of models of the real size. About
four minutes on an H100; 64 GB of RAM for the full size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import provenance
from benchmarks.generate import SIZES


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts, each in a process of its own; exits with 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm/mergetool-models"), help="for the models, in RAM")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    results = ["--results", str(options.results)]
    models = ["--size", options.size, "--dir", str(options.dir)]
    test = ["pytest", "-q", "-p", "no:cacheprovider", "-m"]
    parts = {
        "arithmetic": [*test, "not long", "tests/ops/test_cuda.py", "tests/engine/test_gpu.py"],
        "decomposition": [*test, "gpu", "tests/lowrank/test_batched.py", "tests/difference/test_on_device.py"],
        "methods": [*test, "gpu", "tests/methods/test_every_method.py"],
        "kernels": ["benchmarks.bench_kernels", *results],
        "merge": ["benchmarks.bench_merge_gpu", *models, "--keep", *results],
        "extraction": ["benchmarks.bench_diff_gpu", *models, "--runs", "3", *results],
    }
    summary = []
    for name, command in parts.items():
        print(f"== {name}", flush=True)
        begin = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
        summary.append((name, code, time.perf_counter() - begin))
    for name, code, seconds in summary:
        print(f"{name:16} {'ok' if code == 0 else f'FAILED ({code})':12} {seconds:6.0f} s")
    if any(code for _, code, _ in summary):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
