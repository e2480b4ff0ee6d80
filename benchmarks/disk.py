"""Merge, bake and extraction against the machine's disk, at two sizes, in one call; a table at the end. Needs no network.

    python -m benchmarks.disk --dir DIR [--sizes short full] [--runs 3] [--keep]

"short" is three models of 3.3 GB, which fit in memory, "full" three of 12.3 GB, which may not; DIR needs 60 GB. Merges and bakes are held against the
better of two copies of the same bytes, one that lets go of what it moved and one that keeps it in the page cache (`benchmarks.ceiling`); extraction
against reading both files once. Run it when nothing else does, and as root, so that caches can be dropped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import provenance
from benchmarks.generate import SIZES

PARTS = {"bench_merge": ["--no-peers"], "bench_bake": [], "bench_diff": []}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run every part at every size, each in a process of its own; exits with 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="for the models, a folder a size")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["short", "full"])
    parser.add_argument("--runs", type=int, default=3, help="rounds of each part")
    parser.add_argument("--keep", action="store_true", help="do not delete the models")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    failed = []
    for size in options.sizes:
        folder = options.dir / size
        make(folder, size)
        for part, more in PARTS.items():
            print(f"\n{part}, {size}, load {os.getloadavg()[0]:.1f}", flush=True)
            command = [sys.executable, "-m", f"benchmarks.{part}", "--dir", str(folder), "--size", size, *more]
            command += ["--runs", str(options.runs), "--results", str(options.results)]
            if subprocess.run(command).returncode:
                failed.append(f"{part} at {size}")
        if not options.keep:
            shutil.rmtree(folder)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def make(folder: Path, size: str) -> None:
    """The three models of a size, unless they are there; the one that is baked into is the first of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "deturbo.safetensors").exists():
        command = [sys.executable, "-m", "benchmarks.generate", "family", str(folder), "--size", size, "--overwrite"]
        subprocess.run(command, check=True)
    if not (folder / "model.safetensors").exists():
        os.link(folder / "alkahest.safetensors", folder / "model.safetensors")


if __name__ == "__main__":
    main()
