"""Running the coverage-guided fuzzer in processes of its own, where it may crash, and reading what it did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.hostile.tally import Tally

ROOT = Path(__file__).parents[2]

CI_RUNS: Mapping[str, int] = {
    "header": 30_000,
    "index": 20_000,
    "expression": 3_000,
    "lora": 1_000,
    "quantisation": 6_000,
    "gguf": 20_000,
    "provenance": 10_000,
    "names file": 5_000,
    "config": 20_000,
}
BROKEN_RUNS: Mapping[str, tuple[str, int, str]] = {
    "overlaps": ("header", 30_000, "the library refuses it"),
    "slashes": ("index", 20_000, "shard"),
    "lax JSON": ("config", 20_000, "Error"),
}
"""Holes put in on purpose: the target, the runs within which each must be found, and a part of what is then said."""


def fuzz(target: str, runs: int, folder: Path, *, seed: int = 1, broken: str | None = None) -> Tally:
    """``runs`` inputs for ``target``; the first that breaks its promise ends the run and is kept in ``folder``."""
    tally = Tally(f"fuzz {target}", f"bytes for {target}, guided by coverage", injected=runs)
    # By a shell: a program's most memory begins with that of the process it was forked from, which libFuzzer takes for its own.
    command = [
        *("sh", "-c", '"$@"; exit $?', "sh"),
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.hostile.fuzz",
        target,
        str(folder),
        f"-runs={runs}",
        f"-seed={seed}",
    ]
    done = subprocess.run(
        command + (["--broken", broken] if broken else []),
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
    )  # fmt: skip
    counted = re.search(r"stat::number_of_executed_units: (\d+)", done.stdout)
    tally.judged = int(counted[1]) if counted else 0
    if done.returncode != 0:
        raised = re.findall(r"^(?:[\w.]*Error|Exception)\b.*$|^==\d+==.*ERROR.*$|^ALARM.*$", done.stdout, re.MULTILINE)
        tally.violations.append(f"{target}: exit {done.returncode}: {' '.join(raised)[:600] or done.stdout[-600:]}")
    return tally
