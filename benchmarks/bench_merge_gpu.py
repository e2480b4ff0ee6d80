"""Merge on a GPU, inputs in RAM, against what its copies alone take. Needs no network.

    python -m benchmarks.bench_merge_gpu --dir /dev/shm/models [--size full] [--runs 3] [--no-cpu]

Three models are needed; two are made on the device and the third is a copy of the first under another name. From one run:
(1) the inputs' bytes from page-locked memory to the device, nothing read; (2) the limit: the inputs read through page-locked
memory to the device by as many threads as are best, and one output's bytes back, nothing computed; (3) `a + 20 * (b - c)`
with its result left in host memory, and written to a file; (4) the CPU's merge, whose bytes must be the same.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from benchmarks import provenance
from benchmarks.device_pair import make_pair
from benchmarks.generate import SIZES
from benchmarks.provenance import Result
from mergetool.checkpoint.inputs import InputFile
from mergetool.engine import gpu, job, merge
from mergetool.engine.device import CPU, Device
from mergetool.engine.feeding.uploader import Uploader
from mergetool.recipe.plan import Plan

MULTIPLIER = 20


class Nowhere:
    """An output that is complete when it is in host memory."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Leave it there."""


def timed(work: Callable[[], object]) -> float:
    """Seconds, with the device idle before and after."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


class Copies:
    """The copies of a merge and nothing else, through buffers that are there already."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        self._back = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        self._on_device = torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device=device)
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, size: int) -> None:
        """``size`` bytes from page-locked memory to the device, nothing read."""
        for at in range(0, size, len(self._host)):
            count = min(len(self._host), size - at)
            self._on_device[:count].copy_(self._host[:count], non_blocking=True)

    def whole(self, paths: Sequence[Path], threads: int) -> None:
        """Every byte of the files read by ``threads`` threads and copied to the device, and a file's worth copied back."""
        with Uploader(self._device, threads) as uploader:
            for i, path in enumerate(paths):
                waiting = []
                with InputFile.open(path) as file:
                    for at in range(0, file.size, len(self._on_device)):
                        count = min(len(self._on_device), file.size - at)
                        waiting += uploader.upload(file, at, self._on_device[:count])
                    if i == 0:
                        self._copy_back(file.size)
                    for future in waiting:
                        future.result()
            self._out.synchronize()

    def _copy_back(self, size: int) -> None:
        with torch.cuda.stream(self._out):
            for at in range(0, size, len(self._back)):
                count = min(len(self._back), size - at)
                self._back[:count].copy_(self._on_device[:count], non_blocking=True)


def same_bytes(a: Path, b: Path) -> bool:
    """Whether two files hold the same bytes."""
    if a.stat().st_size != b.stat().st_size:
        return False
    one, other = np.memmap(a, np.uint8, "r"), np.memmap(b, np.uint8, "r")
    step = 1 << 26
    with ThreadPoolExecutor(8) as pool:
        return all(
            pool.map(lambda at: np.array_equal(one[at : at + step], other[at : at + step]), range(0, len(one), step))
        )


def expression(paths: Sequence[Path]) -> str:
    """The bridge merge of three files."""
    a, b, c = (f"'{path}'" for path in paths)
    return f"{a} + {MULTIPLIER} * ({b} - {c})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the models, time, compare, print, append; exits with 1 when the CPU's bytes are others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dir", type=Path, required=True, help="holds the models; those that are there are used again")
    parser.add_argument("--keep", action="store_true", help="do not delete the models")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--cpu", action=argparse.BooleanOptionalAction, default=True, help="compare with the CPU's merge"
    )
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    folder: Path = options.dir
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MERGETOOL_CONFIG_DIR"] = str(folder)
    provenance.commit()
    device = torch.device("cuda")
    paths = [folder / f"{name}.safetensors" for name in ("base", "variant", "copy")]
    try:
        if not all(path.exists() for path in paths[:2]):
            make_pair(folder, options.size, device)
        shutil.copyfile(paths[0], paths[2])
        rows, same = measure(paths, device, options.runs, cpu=options.cpu)
        provenance.append(rows, folder=folder, path=options.results)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    for row in rows:
        cells = row.row()
        rate = f"{(row.bytes_read or 0) / cells['p50'] / 1e9:6.1f} GB/s in"
        print(f"{row.provider:34}{cells['p50']:9.3f} s {rate}  {cells['ratio']:6.2f} x {row.ratio_to}")
    if options.cpu:
        print("the CPU's bytes" if same else "OTHER BYTES than the CPU's", flush=True)
    if not same:
        raise SystemExit(1)


def measure(paths: Sequence[Path], device: torch.device, runs: int, *, cpu: bool) -> tuple[list[Result], bool]:
    """Times of everything, round by round, and whether both processors wrote the same file."""
    size = sum(path.stat().st_size for path in paths)
    on_gpu = Device(("cuda:0",))
    outputs = paths[0].parent / "gpu.safetensors", paths[0].parent / "cpu.safetensors"
    seconds: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], object]) -> None:
        seconds.setdefault(name, []).append(timed(work))

    copies = Copies(device)
    with job.open_merge(expression(paths)) as plan:
        merge.run(plan, Nowhere(), device=on_gpu)  # compiles, and pins memory
        probes = {n: timed(lambda n=n: copies.whole(paths, n)) for n in (8, 12, 16, 24)}  # type: ignore[misc]
        best = min(probes, key=lambda n: probes[n])
        copies.pinned(1 << 28)
        for _ in range(runs):
            note("page-locked copy", lambda: copies.pinned(size))
            note("read, copy in, copy out", lambda: copies.whole(paths, best))
            note("mergetool, to host memory", lambda: merge.run(plan, Nowhere(), device=on_gpu))
        for _ in range(2):
            note("mergetool, to a file", lambda: job.run_merge(plan, outputs[0], overwrite=True, device=on_gpu))
        if cpu:
            note("mergetool on the CPU, to a file", lambda: _on_cpu(plan, outputs[1]))
    same = not cpu or same_bytes(*outputs)
    for output in outputs:
        output.unlink(missing_ok=True)
    case = f"{provenance.size_name(paths[0])}, three inputs in RAM"
    config = {"readers": best, "chunk": gpu.CHUNK, "seats": gpu.SEATS, "ring": gpu.RING} | (
        {"same_bytes": same} if cpu else {}
    )
    limit = "read, copy in, copy out"
    rows = [
        Result(
            "merge gpu", case, name, "seconds", values, "s", ratio_to=limit,
            ratio=provenance.percentile(values, 0.5) / provenance.percentile(seconds[limit], 0.5),
            cache="in RAM", bytes_read=size, device=torch.cuda.get_device_name(device), config=config,
        )
        for name, values in seconds.items()
    ]  # fmt: skip
    return rows, same


def _on_cpu(plan: Plan, output: Path) -> None:
    job.run_merge(plan, output, overwrite=True, device=CPU)


if __name__ == "__main__":
    main()
