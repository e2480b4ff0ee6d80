"""How well the driver of a merge feeds a GPU, on a machine that has none. Needs no network and no disk space.

    python -m benchmarks.bench_feeding [--ring MIB ...] [--runs 3]

The driver, its threads and its Python are the real ones; what the hardware does is waiting. Three full-size models are
sparse files, a thread's read lasts as long as one of 16 did on an H100 machine (36.9 GB in 1.22 s by all), copies queue
for a link of 55 GB/s in each direction, and a launch keeps Python busy for 160 us. The limit is the same reads and
copies by 16 threads, and nothing else. Not simulated: that fewer reading threads are faster each, and real processors
waiting for each other. It shows what the order of work and Python's lock cost, not how fast a GPU is.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import provenance
from benchmarks.bench_merge_gpu import Nowhere
from benchmarks.device_pair import header_of
from benchmarks.provenance import Result
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.inputs import Readable
from mergetool.engine import gpu, job, merge
from mergetool.engine.device import Device
from mergetool.engine.feeding.uploader import PIECE, Uploader
from mergetool.ops.cuda import CudaOps
from mergetool.ops.movement import Movement
from mergetool.ops.rounding import Nearest, Stochastic

READERS = 16
READ = 36.9e9 / 1.22 / READERS
"""Bytes a second that one thread reads from the page cache."""

LINK = 55e9
"""Bytes a second to the device, and as many back."""

DEVICE_MEMORY = 3e12
"""Bytes a second that a kernel reads and writes."""

LAUNCH, COPY, COLLECT = 160e-6, 12e-6, 30e-6
"""Seconds that Python is busy with a kernel's launch, with starting a copy, and with taking the result."""


class Queue:
    """A part of the device that does one thing after the other."""

    def __init__(self) -> None:
        self._free = 0.0
        self._lock = threading.Lock()

    def after(self, moment: float, seconds: float) -> float:
        """When something is done that takes ``seconds`` and cannot begin before ``moment``."""
        with self._lock:
            self._free = max(self._free, moment, time.perf_counter()) + seconds
            return self._free


COPYING_IN, COMPUTING, COPYING_OUT = Queue(), Queue(), Queue()


def busy(seconds: float) -> None:
    """Hold Python's lock."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def sleep_until(moment: float) -> None:
    """Wait without the lock."""
    time.sleep(max(0.0, moment - time.perf_counter()))


class WaitingOps(CudaOps):
    """Arithmetic that only takes its time; the result is whatever its buffer holds."""

    def __init__(self, *, capacity: int, registers: int, device: str = "cpu") -> None:
        super().__init__(capacity=capacity, registers=registers, device=device)
        self._out = torch.empty(capacity * 2, dtype=torch.uint8)
        self._ready = 0.0

    def launch(self, register: int, dtype: DType, rounding: Nearest | Stochastic, first: int | None = None) -> None:
        busy(LAUNCH)
        size = self._operands[0].numel() * dtype.itemsize
        moved = size + sum(operand.nbytes for operand in self._operands)
        self._result = self._out[:size]
        self._ready = COPYING_OUT.after(COMPUTING.after(WaitingUploader.latest, moved / DEVICE_MEMORY), size / LINK)

    def collect(self) -> tuple[memoryview, int]:
        sleep_until(self._ready)
        busy(COLLECT)
        self._counts, self._movement = [0] * 5, Movement(1, 0, 0, 1.0, 1.0)
        return self._result.numpy().data, 0


class WaitingUploader(Uploader):
    """An uploader whose reads and copies only take their time."""

    latest = 0.0
    """When the copies that were waited for last are done."""

    def _copy(self, file: Readable, offset: int, target: Tensor) -> None:
        buffers = getattr(self._own, "copied", (0.0, 0.0))
        sleep_until(buffers[0])
        time.sleep(target.numel() / READ)
        busy(COPY)
        copied = COPYING_IN.after(0.0, target.numel() / LINK)
        self._own.copied = buffers[1], copied
        WaitingUploader.latest = max(WaitingUploader.latest, copied)


def sparse_models(folder: Path) -> list[Path]:
    """Three full-size checkpoints, BF16 zeros that are no blocks on the disk."""
    header = header_of("full")
    paths = [folder / f"{name}.safetensors" for name in "abc"]
    for path in paths:
        with path.open("wb") as file:
            file.write(header.encode())
            file.truncate(header.data_start + header.data_size)
    return paths


def limit(sizes: Sequence[int]) -> float:
    """Seconds of reading and copying in alone, each thread with two buffers."""
    own = threading.local()

    def move(size: int) -> None:
        copied = getattr(own, "copied", (0.0, 0.0))
        sleep_until(copied[0])
        time.sleep(size / READ)
        busy(COPY)
        own.copied = copied[1], COPYING_IN.after(0.0, size / LINK)

    begin = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        pieces = [min(PIECE, size - at) for size in sizes for at in range(0, size, PIECE)]
        list(pool.map(move, pieces))
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the limit and the driver, round by round; print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--ring", type=int, nargs="+", default=[gpu.RING >> 20], help="MiB of device memory for operands"
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    provenance.commit()
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        a, b, c = paths = sparse_models(folder)
        sizes = [path.stat().st_size for path in paths]
        with (
            job.open_merge(f"'{a}' + 20 * ('{b}' - '{c}')") as plan,
            patch.object(gpu, "Uploader", WaitingUploader),
            patch("mergetool.ops.cuda.CudaOps", WaitingOps),
            patch.object(gpu, "readers", lambda: READERS),
        ):
            for _ in range(options.runs):
                seconds.setdefault("read, copy in", []).append(limit(sizes))
                for ring in options.ring:
                    with patch.object(gpu, "RING", ring << 20):
                        begin = time.perf_counter()
                        merge.run(plan, Nowhere(), device=Device(("cpu",), memory=1 << 34))
                        seconds.setdefault(f"mergetool, ring of {ring} MiB", []).append(time.perf_counter() - begin)
        rows = [
            Result(
                "feeding a gpu", "full, three inputs, simulated", provider, "seconds", values, "s",
                ratio_to="read, copy in", ratio=provenance.median_ratio(values, seconds["read, copy in"]),
                cache="simulated", bytes_read=sum(sizes), device="simulated H100",
                config={"chunk": gpu.CHUNK, "seats": gpu.SEATS, "piece": PIECE, "readers": READERS},
            )
            for provider, values in seconds.items()
        ]  # fmt: skip
        provenance.append(rows, folder=folder, path=options.results)
    for row in rows:
        cells = row.row()
        print(f"{row.provider:30}{cells['p50']:8.3f} s{cells['ratio']:8.2f} x {row.ratio_to}")


if __name__ == "__main__":
    main()
