"""Row 16: a run needs no more memory than ``--dry-run`` said: in a memory cgroup of that figure and 5 %, with inputs that are many times larger.

Inputs are sparse, so they take no disk; their holes are read as zeros through the page cache as any other bytes.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.hostile.tally import Tally

CGROUP = Path("/sys/fs/cgroup/memory")
WIDTH = 2048
LARGEST = 2 * WIDTH * WIDTH  # bytes of one matrix


@dataclass(frozen=True)
class Run:
    """A command without its output; "OUT" stands for a file, "FOLDER" for a folder."""

    name: str
    line: list[str]
    output: str = "OUT"


MERGE = "'a.safetensors' + 3 * ('b.safetensors' - 'c.safetensors')"
RUNS = [
    Run("merge", ["merge", MERGE]),
    Run("merge, pread", ["merge", MERGE, "--reader", "pread"]),
    Run("merge, quantised", ["merge", MERGE, "--quant", "fp8-scaled", "--scale-search"]),
    Run("merge, error feedback", ["merge", MERGE, "--dtype", "fp8_e4m3", "--rounding", "error-feedback"]),
    Run("merge, method", ["merge", "slerp('a.safetensors', 'b.safetensors', t=0.3)"]),
    Run("merge, sharded", ["merge", MERGE, "--shard-size", "100MB"], "FOLDER"),
    Run("convert", ["convert", "a.safetensors", "--quant", "int8"]),
    Run("lora bake", ["lora", "bake", "a.safetensors", "lora.safetensors:0.5"]),
]  # fmt: skip


def inputs(folder: Path, count: int) -> None:
    """``a``, ``b`` and ``c`` of ``count`` matrices of 8 MB, all holes, and a LoRA on every one of them."""
    names = [f"layers.{i}.attention.proj.weight" for i in range(count)]
    table = {
        name: {"dtype": "BF16", "shape": [WIDTH, WIDTH], "data_offsets": [i * LARGEST, (i + 1) * LARGEST]}
        for i, name in enumerate(names)
    }
    text = json.dumps(table).encode()
    for stem in "abc":
        with (folder / f"{stem}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + count * LARGEST)
    with (folder / "b.safetensors").open("r+b") as file:  # something to merge in every matrix
        for i in range(count):
            file.seek(8 + len(text) + i * LARGEST)
            file.write(
                torch.randn(WIDTH, generator=torch.Generator().manual_seed(i)).bfloat16().view(torch.uint8).numpy()
            )
    lora = {}
    for name in names:
        module = name.removesuffix(".weight")
        lora |= {
            f"{module}.lora_A.weight": torch.ones(4, WIDTH).bfloat16(),
            f"{module}.lora_B.weight": torch.ones(WIDTH, 4).bfloat16(),
        }
    save_file(lora, folder / "lora.safetensors")


@contextmanager
def limited(size: int) -> Iterator[Path]:
    """A memory cgroup of ``size`` bytes."""
    group = CGROUP / f"mergetool-hostile-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        yield group
    finally:
        group.rmdir()


def figure(line: list[str], folder: Path) -> int:
    """The bytes that a dry run of the command says it needs; of convert, which has no dry run, those of the same merge."""
    if line[0] == "convert":
        line = ["merge", f"'{line[1]}'", *line[2:]]
    done = subprocess.run(
        _command([*line, "--dry-run", "--json"]), cwd=folder, capture_output=True, text=True, check=True
    )
    return int(json.loads(done.stdout)["memory"])


def run(
    folder: Path, count: int, runs: list[Run], *, figure: Callable[[list[str], Path], int] = figure, share: float = 1.05
) -> Tally:
    """Every command within ``share`` of the figure it printed, on two threads; each has to succeed."""
    tally = Tally("16", "memory cgroup at the figure of --dry-run and 5 %")
    inputs(folder, count)
    for one in runs:
        line = [*one.line, "-o", "out" + (".safetensors" if one.output == "OUT" else ""), "--threads", "2"]
        tally.injected += 1
        printed = figure(line, folder)
        with limited(int(printed * share)) as group:
            ended = _in(group, line, folder)
            failures = int((group / "memory.failcnt").read_text())
        fault = None
        if ended.returncode != 0:
            reason = (
                "killed" if ended.returncode == -signal.SIGKILL else f"exit {ended.returncode}: {ended.stderr[-200:]}"
            )
            fault = f"{one.name}: {reason} within {int(printed * share) >> 20} MiB ({failures} refusals)"
        tally.judge(fault)
        subprocess.run(["rm", "-rf", folder / "out", folder / "out.safetensors"], check=True)
    return tally


def _in(group: Path, line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(
        [*_command(line), "--no-progress"], cwd=folder, capture_output=True, text=True, check=False, preexec_fn=enter
    )


def _command(line: list[str]) -> list[str]:
    return [str(Path(sys.executable).with_name("mergetool")), *line]
