"""Row 16: a run needs no more memory than ``--dry-run`` said: in a memory cgroup of that figure and 5 %, by every method and kind of output.

Inputs are sparse, so they take no disk; their holes are read as zeros through the page cache as any other bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergetool.methods import methods
from tests.hostile.tally import Tally
from tests.hostile.values import MODELS, call
from tests.hostile.warm import Warm

CGROUP = Path("/sys/fs/cgroup/memory")
WIDTH = 2048
RANK = 4
SHARE = 1.05
TIMES = 4
"""How much larger than the limit inputs are together that have to be streamed."""

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Run:
    """A command without its output; the output is a folder where there is none in the name."""

    name: str
    line: list[str]
    output: str = "out.safetensors"


MERGE = "'a.safetensors' + 3 * ('b.safetensors' - 'c.safetensors')"
KINDS = [
    Run("merge", ["merge", MERGE, "--force"]),
    Run("merge, pread", ["merge", MERGE, "--force", "--reader", "pread"]),
    Run("merge, quantised", ["merge", MERGE, "--force", "--quant", "fp8-scaled", "--scale-search"]),
    Run("merge, error feedback", ["merge", MERGE, "--force", "--dtype", "fp8_e4m3", "--rounding", "error-feedback"]),
    Run("merge, sharded", ["merge", MERGE, "--force", "--shard-size", "100MB"], "out"),
    Run("convert", ["convert", "a.safetensors", "--quant", "int8"]),
    Run("lora bake", ["lora", "bake", "a.safetensors", "lora.safetensors:0.5", "--force"]),
]
METHODS = [Run(f"merge by {name}", ["merge", call(method), "--force"]) for name, method in methods().items()]
RUNS = [*KINDS, *METHODS]

SHAPES: dict[str, Shapes] = {
    "even": [(WIDTH, WIDTH)] * 3,
    "one large": [(2 * WIDTH, WIDTH), *[(512, 512)] * 8],
    "many small": [(64, 64)] * 1500,
}
"""Checkpoints of one size, of one tensor that is most of them, and of more names than bytes."""
SOME = [*KINDS, *METHODS[::4]]
IN_TURN = {"even": SOME[::2], "one large": SOME[1::2], "many small": SOME[:1]}
"""What CI runs, two to five seconds each: every kind of output and every fourth method on one of the shapes, one on the last, which takes the longest.
What every method itself holds is measured by `tests.methods.footprint`."""


def streamed(limit: int) -> Shapes:
    """Matrices of one size, so many that two models are `TIMES` a limit in bytes."""
    return [(WIDTH, WIDTH)] * (TIMES * limit // (2 * 2 * WIDTH * WIDTH) + 1)


def inputs(folder: Path, shapes: Shapes) -> None:
    """Models ``a`` to ``d`` in BF16, all holes but for a row of every matrix, and a LoRA on each of ``a``'s."""
    names = [f"layers.{i}.attention.proj.weight" for i in range(len(shapes))]
    table, starts = {}, [0]
    for name, shape in zip(names, shapes, strict=True):
        starts.append(starts[-1] + 2 * shape[0] * shape[1])
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": starts[-2:]}
    text = json.dumps(table).encode()
    for seed, stem in enumerate(MODELS):
        random = torch.Generator().manual_seed(seed)
        with (folder / f"{stem}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for start, shape in zip(starts, shapes, strict=False):
                file.seek(8 + len(text) + start)
                file.write(torch.randn(shape[1], generator=random).bfloat16().view(torch.uint8).numpy())
            file.truncate(8 + len(text) + starts[-1])
    lora = {}
    for name, shape in zip(names, shapes, strict=True):
        module = name.removesuffix(".weight")
        lora[f"{module}.lora_A.weight"] = torch.ones(RANK, shape[1]).bfloat16()
        lora[f"{module}.lora_B.weight"] = torch.ones(shape[0], RANK).bfloat16()
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


def figure(warm: Warm, line: list[str], folder: Path) -> int:
    """The bytes that a dry run of the command says it needs; of convert, which has no dry run, those of the same merge."""
    if line[0] == "convert":
        line = ["merge", f"'{line[1]}'", *line[2:]]
    return int(json.loads(warm.run([*line, "--dry-run", "--json"], folder).out)["memory"])


def run(warm: Warm, folder: Path, runs: Sequence[Run], shapes: Shapes, tally: Tally, *, share: float = SHARE) -> None:
    """Every command within ``share`` of the figure it printed, on two threads; each has to succeed."""
    inputs(folder, shapes)
    for one in runs:
        line = [*one.line, "-o", one.output, "--threads", "2", "--no-progress"]
        tally.injected += 1
        limit = int(figure(warm, line, folder) * share)
        with limited(limit) as group:
            ended = _in(group, line, folder)
            most = int((group / "memory.max_usage_in_bytes").read_text())
        told = f"{one.name}: within {limit >> 20} MiB, {most >> 20} used, exit {ended.returncode} {ended.stderr[-200:]}"
        tally.judge(None if ended.returncode == 0 else told)
        written = folder / one.output
        shutil.rmtree(written) if written.is_dir() else written.unlink(missing_ok=True)


def every(warm: Warm, folder: Path, *, is_long: bool = False) -> Tally:
    """The runs of CI on one of the shapes in turn; before a release all of them on all shapes, and on models of `TIMES` the limit."""
    tally = Tally("16", "memory cgroup at the figure of --dry-run and 5 %")
    for name, shapes in SHAPES.items():
        (folder / name).mkdir()
        run(warm, folder / name, RUNS if is_long else IN_TURN[name], shapes, tally)
    (folder / "streamed").mkdir()
    largest = max(figure(warm, one.line, folder / "even") for one in RUNS) if is_long else 300 << 20
    run(warm, folder / "streamed", RUNS if is_long else RUNS[:1], streamed(largest), tally)
    return tally


def _in(group: Path, line: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: a fork of a warm one shares pages, and copies others that a run has once."""

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    command = [str(Path(sys.executable).with_name("mergetool")), *line]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, preexec_fn=enter)
