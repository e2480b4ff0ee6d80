"""Merge on a GPU: read, copy in, compute, copy out and write, all at the same time.

Many threads read (and wait for the disk), one launches: Python's lock lets only one thread of a process act at a time, and
with sixteen that each did a whole job, an H100 was fed at 15 GB/s where its readers alone reach 29.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergetool.checkpoint.dtypes import DType
from mergetool.engine.device import Device, failure, free_memory
from mergetool.engine.feeding import uploader
from mergetool.engine.feeding.ring import ALIGNMENT, Region, Ring, aligned
from mergetool.engine.feeding.uploader import Arrival, Uploader
from mergetool.engine.threads import default_threads
from mergetool.ops.contract import execute
from mergetool.ops.movement import Movement
from mergetool.ops.rounding import ErrorFeedback
from mergetool.recipe.plan import Plan

if TYPE_CHECKING:
    from mergetool.engine.jobs import Job, Quantise
    from mergetool.ops.cuda import CudaOps

CHUNK = 1 << 24
"""Elements of a job: 32 MB of bf16 an operand. Of 2 Mi to 16 Mi each larger one was faster: less Python for each byte."""

SEATS = 4
"""Jobs on the device at once, being computed, copied out and written; each has a thread that writes."""

RING = 1 << 30
"""Bytes of the device's memory for operands that are being read, copied in and computed with. Simulated (benchmarks.bench_feeding), half of it takes
1.25 times as long, and twice as much is no faster."""

READERS = 16


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that a merge holds on a GPU and for it.

    ``seats`` jobs of at most ``chunk`` elements are being computed, with ``ring`` bytes for operands. ``results`` are the bytes that a job writes, at most.
    """

    seats: int
    chunk: int
    ring: int
    results: int

    @property
    def pinned(self) -> int:
        """Bytes of page-locked host memory, at most."""
        return uploader.page_locked(readers()) + self.seats * self.results


def readers() -> int:
    """The number of threads that read.

    They are more than this machine's processors where these are few, since they wait for the disk.
    """
    return max(4, min(READERS, default_threads()))


def room(plan: Plan, device: Device) -> Room:
    """Decide what fits into the memory that may be taken of each GPU.

    There is no seat at all where not even a small job fits.
    """
    merged = [(tensor, step) for tensor in plan.tensors for step in tensor.steps if step.program is not None]
    read = max((sum(_bytes(window.dtype) for window in step.windows) for _, step in merged), default=1)
    windows = max((len(step.windows) for _, step in merged), default=1)
    written = max((_bytes(tensor.dtype) for tensor, _ in merged), default=1)
    allowed = min(device.memory or free_memory(name) * 4 // 5 for name in device.names)
    chunk = CHUNK
    while chunk > 1 << 16 and (3 * chunk * (read + written) > allowed or 4 * chunk * read > RING):
        chunk //= 2
    seats = min(SEATS, allowed // (chunk * (read + written)))
    ring = max(chunk * read + windows * ALIGNMENT, min(RING, allowed - seats * chunk * written))
    return Room(seats, chunk, ring, chunk * written)


def _bytes(dtype: DType) -> int:
    return -(-dtype.bits // 8)


def suits(job: Job | Quantise) -> bool:
    """Whether a GPU does this job: arithmetic of plain floats.

    Copies, what goes element by element, and quantised weights, read or written, are the CPU's; so are programs with method
    calls, whose methods it hands to the GPU itself.
    """
    if job.phase is not None or isinstance(job.rounding, ErrorFeedback):
        return False
    step = job.step
    if step.program is None or step.program.calls:
        return False
    return not any(window.encoding for window in step.windows)


@dataclass(frozen=True)
class Tasks:
    """The calls of a driver to the run it works for, from its threads."""

    take: Callable[[], tuple[int, Job] | None]
    redo: Callable[[Job], tuple[int, Movement | None]]
    done: Callable[[int, Job, int, Movement | None, int], None]  # index, job, bytes moved, movement, capped
    off_device: Callable[[Job], None]
    fail: Callable[[BaseException], None]


@dataclass(frozen=True, slots=True)
class _Loading:
    """A job whose operands are on their way to a region of the device's ring, one after the other, each at a multiple of 16 bytes."""

    index: int
    job: Job
    region: Region
    operands: Sequence[Tensor]  # as stored, uint8
    arrivals: Sequence[Arrival]


class Driver:
    """One GPU's share of a run, from one launching thread."""

    def __init__(self, plan: Plan, write: Callable[[str, int, memoryview], None], tasks: Tasks, name: str, room: Room,
                 *, measured: bool) -> None:  # fmt: skip
        self._plan = plan
        self._write = write
        self._tasks = tasks
        self._name = name
        self._room = room
        self._measured = measured
        self._registers = plan.registers
        self._free: queue.SimpleQueue[CudaOps] = queue.SimpleQueue()
        self._ring = Ring(room.ring)

    def work(self) -> None:
        """Do jobs until none is left or the run stops. Raises DeviceError when the GPU fails."""
        try:
            memory = self._allocate()
            if memory is None:
                self._without_device()
            else:
                self._work(memory)
        except torch.AcceleratorError as error:
            raise failure(self._name, error) from None

    def _work(self, memory: Tensor) -> None:
        loading: deque[_Loading] = deque()
        with Uploader(memory.device, readers()) as up, ThreadPoolExecutor(SEATS, "write") as writers:
            taken = self._tasks.take()
            while taken or loading:
                # As much as there is room for is being read before the oldest is waited for.
                if taken and (region := self._ring.take(_job_bytes(taken[1]), wait=not loading)):
                    loading.append(self._load(*taken, region, memory, up))
                    taken = self._tasks.take()
                else:
                    self._compute(loading.popleft(), writers)

    def _allocate(self) -> Tensor | None:
        """The ring's memory, and as many seats as there is memory for; None where there is none for a single one."""
        from mergetool.ops.cuda import CudaOps

        memory = None
        try:
            if self._room.seats:
                memory = torch.empty(self._room.ring, dtype=torch.uint8, device=self._name)
            for _ in range(self._room.seats):
                self._free.put(CudaOps(capacity=self._room.chunk, registers=self._registers + 1, device=self._name))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return None if self._free.empty() else memory

    def _without_device(self) -> None:
        while (taken := self._tasks.take()) is not None:
            self._tasks.off_device(taken[1])
            self._tasks.done(*taken, *self._tasks.redo(taken[1]), 0)

    def _load(self, index: int, job: Job, region: Region, memory: Tensor, up: Uploader) -> _Loading:
        """Have the job's operands read and copied in."""
        operands, arrivals, place = [], list[Arrival](), region.start
        for window in job.step.windows:
            file, base = self._plan.inputs[window.input].checkpoint.locate(window.tensor)
            offset, size = base + window.start + job.start * window.dtype.itemsize, job.count * window.dtype.itemsize
            operands.append(memory[place : place + size])
            arrivals += up.upload(file, offset, operands[-1])
            place += aligned(size)
        return _Loading(index, job, region, operands, arrivals)

    def _compute(self, loading: _Loading, writers: ThreadPoolExecutor) -> None:
        """Start a job's arithmetic, and the copy of its result, when its operands are read."""
        ops = self._free.get()
        try:
            Uploader.finish(loading.arrivals, ops.stream)
            self._launch(ops, loading)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._tasks.off_device(loading.job)
            self._tasks.done(loading.index, loading.job, *self._tasks.redo(loading.job), 0)
            self._ring.give_back(loading.region)
            self._free.put(ops)
        else:
            writers.submit(self._finish, ops, loading)

    def _launch(self, ops: CudaOps, loading: _Loading) -> None:
        job, first = loading.job, None
        operands = [(stored, window.dtype) for stored, window in zip(loading.operands, job.step.windows, strict=True)]
        assert job.step.program is not None
        assert not isinstance(job.rounding, ErrorFeedback)
        execute(job.step.program, ops, lambda register, model: ops.take(register, *operands[model]))
        if self._measured and job.step.base is not None:
            first = self._registers
            ops.take(first, *operands[job.step.base])
        ops.launch(0, job.tensor.dtype, job.rounding, first)

    def _finish(self, ops: CudaOps, loading: _Loading) -> None:
        index, job = loading.index, loading.job
        try:
            movement = None
            try:
                out, beyond = ops.collect()
                is_whole = ops.is_finite(0) and (job.tensor.dtype.bits == 8 or not beyond)
                if is_whole and self._measured and job.step.base is not None:
                    movement = ops.measure(0, self._registers, job.tensor.dtype)
            finally:
                self._ring.give_back(loading.region)
            if is_whole:
                at = (job.step.first + job.start) * job.tensor.dtype.itemsize
                self._write(job.tensor.name, at, out)
                moved = len(out) + sum(job.count * window.dtype.itemsize for window in job.step.windows)
            else:
                # The CPU says which model, which element, and whether to keep it.
                moved, movement, beyond = *self._tasks.redo(job), 0
            self._tasks.done(index, job, moved, movement, beyond)
        except torch.AcceleratorError as error:
            self._tasks.fail(failure(self._name, error))
        except BaseException as error:
            self._tasks.fail(error)
        finally:
            self._free.put(ops)


def _job_bytes(job: Job) -> int:
    return sum(aligned(job.count * window.dtype.itemsize) for window in job.step.windows)
