"""Merge on a GPU: reading, copying in, arithmetic, copying out and writing, each going on while the others do.

Many threads read (and wait for the disk), one launches: Python's lock lets only one thread of a process act at a time, and
with sixteen that each did a whole job, an H100 was fed at 15 GB/s where its readers alone reach 29.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergetool.checkpoint.dtypes import DType
from mergetool.engine.device import Device, failure, free_memory
from mergetool.engine.ring import ALIGNMENT, Region, Ring, aligned
from mergetool.engine.threads import default_threads
from mergetool.ops.contract import execute
from mergetool.ops.movement import Movement
from mergetool.ops.rounding import ErrorFeedback
from mergetool.recipe.plan import Plan

if TYPE_CHECKING:
    from mergetool.engine.jobs import Job, Quantise

CHUNK = 1 << 24
"""Elements of a job: 32 MB of bf16 an operand. Of 2 Mi to 16 Mi each larger one was faster: less Python for each byte."""

SEATS = 4
"""Jobs on the device at once, being copied in, computed, copied out and written; each has a thread that writes."""

RING = 1 << 29
"""Bytes of page-locked memory for what is being read and copied in. Simulated (benchmarks.bench_feeding), half of it takes 1.6 times
as long, and twice as much saves 3 %."""

PIECE = 16 << 20
"""Bytes that one thread reads at once."""

READERS = 16


@dataclass(frozen=True, slots=True)
class Room:
    """How much a merge holds on a GPU and for it: ``seats`` jobs of at most ``chunk`` elements on the device.

    ``operands`` and ``results`` are the bytes that a job reads and writes, at most.
    """

    seats: int
    chunk: int
    operands: int
    results: int

    @property
    def pinned(self) -> int:
        """Bytes of page-locked host memory, at most."""
        return RING + self.seats * self.results


def readers() -> int:
    """How many threads read: more than this machine's processors where they are few, since they wait for the disk."""
    return max(4, min(READERS, default_threads()))


def room(plan: Plan, device: Device) -> Room:
    """What fits into the memory that may be taken of each GPU; no seat at all where not even a small job does."""
    merged = [(tensor, step) for tensor in plan.tensors for step in tensor.steps if step.program is not None]
    read = max((sum(_bytes(window.dtype) for window in step.windows) for _, step in merged), default=1)
    windows = max((len(step.windows) for _, step in merged), default=1)
    written = max((_bytes(tensor.dtype) for tensor, _ in merged), default=1)
    allowed = min(device.memory or free_memory(name) * 4 // 5 for name in device.names)
    chunk = CHUNK
    while chunk > 1 << 16 and (3 * chunk * (read + written) > allowed or 4 * chunk * read > RING):
        chunk //= 2
    return Room(
        min(SEATS, allowed // (chunk * (read + written))),
        chunk,
        chunk * read + windows * ALIGNMENT,
        chunk * written,
    )


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
    """What a driver needs of the run it works for; called from its threads."""

    take: Callable[[], tuple[int, Job] | None]
    redo: Callable[[Job], tuple[int, Movement | None]]
    done: Callable[[int, Job, int, Movement | None, int], None]  # index, job, bytes moved, movement, capped
    off_device: Callable[[Job], None]
    fail: Callable[[BaseException], None]


@dataclass(frozen=True, slots=True)
class _Loading:
    """A job whose operands are being read, one after the other in page-locked memory, each at a multiple of 16 bytes."""

    index: int
    job: Job
    region: Region
    operands: Tensor  # the region's bytes, uint8
    places: Sequence[int]  # where in the operands each window's bytes begin
    reads: Sequence[Future[None]]


class Seat:
    """A job's memory on the device, and what computes there."""

    def __init__(self, room: Room, registers: int, device: str) -> None:
        from mergetool.ops.cuda import CudaOps

        self.operands = torch.empty(room.operands, dtype=torch.uint8, device=device)
        self.ops = CudaOps(capacity=room.chunk, registers=registers, device=device)
        # As in CudaOps: a thread that waits must sleep.
        self._copied = torch.cuda.Event(blocking=True) if self.ops.stream is not None else None  # type: ignore[no-untyped-call]

    def copy_in(self, stored: Tensor) -> None:
        """Start copying a job's operands to the device."""
        with torch.cuda.stream(self.ops.stream):
            self.operands[: stored.numel()].copy_(stored, non_blocking=True)
            if self._copied is not None:
                self._copied.record(self.ops.stream)

    def wait_until_copied(self) -> None:
        """Until then the operands' page-locked memory is in use."""
        if self._copied is not None:
            self._copied.synchronize()


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
        self._free: queue.SimpleQueue[Seat] = queue.SimpleQueue()
        self._ring = Ring(RING)

    def work(self) -> None:
        """Do jobs until there are none left, or the run stops; raises DeviceError when the GPU fails."""
        try:
            if self._allocate():
                self._work()
            else:
                self._without_device()
        except torch.AcceleratorError as error:
            raise failure(self._name, error) from None

    def _work(self) -> None:
        pinned = torch.empty(RING, dtype=torch.uint8, pin_memory=torch.device(self._name).type == "cuda")
        loading: deque[_Loading] = deque()
        with ThreadPoolExecutor(readers(), "read") as pool, ThreadPoolExecutor(SEATS, "write") as writers:
            taken = self._tasks.take()
            while taken or loading:
                # As much as there is room for is being read before the oldest is waited for.
                if taken and (region := self._ring.take(_job_bytes(taken[1]), wait=not loading)):
                    loading.append(self._load(*taken, region, pinned, pool))
                    taken = self._tasks.take()
                else:
                    self._compute(loading.popleft(), writers)

    def _allocate(self) -> int:
        """As many seats as there is memory for; returns their number."""
        made = 0
        try:
            for _ in range(self._room.seats):
                self._free.put(Seat(self._room, self._registers + 1, self._name))
                made += 1
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return made

    def _without_device(self) -> None:
        while (taken := self._tasks.take()) is not None:
            self._tasks.off_device(taken[1])
            self._tasks.done(*taken, *self._tasks.redo(taken[1]), 0)

    def _load(self, index: int, job: Job, region: Region, pinned: Tensor, pool: ThreadPoolExecutor) -> _Loading:
        """Start reading the job's operands."""
        buffer = pinned.numpy().data
        places, reads, place = [], [], 0
        for window in job.step.windows:
            file, base = self._plan.inputs[window.input].checkpoint.locate(window.tensor)
            offset, size = base + window.start + job.start * window.dtype.itemsize, job.count * window.dtype.itemsize
            start = region.start + place
            for at in range(0, size, PIECE):
                piece = buffer[start + at : start + min(at + PIECE, size)]
                reads.append(pool.submit(file.read_into, piece, offset + at))
            places.append(place)
            place += aligned(size)
        return _Loading(index, job, region, pinned[region.start : region.start + region.size], places, reads)

    def _compute(self, loading: _Loading, writers: ThreadPoolExecutor) -> None:
        """Copy a job's operands in when they are read, and start its arithmetic and the copy of its result."""
        for read in loading.reads:
            read.result()
        seat = self._free.get()
        try:
            self._launch(seat, loading)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            self._tasks.off_device(loading.job)
            self._tasks.done(loading.index, loading.job, *self._tasks.redo(loading.job), 0)
            self._ring.give_back(loading.region)
            self._free.put(seat)
        else:
            writers.submit(self._finish, seat, loading)

    def _launch(self, seat: Seat, loading: _Loading) -> None:
        ops, job, first = seat.ops, loading.job, None
        seat.copy_in(loading.operands)
        operands = [
            (seat.operands[at : at + job.count * window.dtype.itemsize], window.dtype)
            for at, window in zip(loading.places, job.step.windows, strict=True)
        ]
        assert job.step.program is not None
        assert not isinstance(job.rounding, ErrorFeedback)
        execute(job.step.program, ops, lambda register, model: ops.take(register, *operands[model]))
        if self._measured and job.step.base is not None:
            first = self._registers
            ops.take(first, *operands[job.step.base])
        ops.launch(0, job.tensor.dtype, job.rounding, first)

    def _finish(self, seat: Seat, loading: _Loading) -> None:
        index, job, ops = loading.index, loading.job, seat.ops
        try:
            try:
                seat.wait_until_copied()
            finally:
                self._ring.give_back(loading.region)
            out, beyond = ops.collect()
            narrow = job.tensor.dtype.bits == 8
            if not ops.is_finite(0) or (beyond and not narrow):
                # The CPU says which model, which element, and whether to keep it.
                moved, movement, beyond = *self._tasks.redo(job), 0
            else:
                at = (job.step.first + job.start) * job.tensor.dtype.itemsize
                self._write(job.tensor.name, at, out)
                moved = len(out) + sum(job.count * window.dtype.itemsize for window in job.step.windows)
                measured = self._measured and job.step.base is not None
                movement = ops.measure(0, self._registers, job.tensor.dtype) if measured else None
            self._tasks.done(index, job, moved, movement, beyond)
        except torch.AcceleratorError as error:
            self._tasks.fail(failure(self._name, error))
        except BaseException as error:
            self._tasks.fail(error)
        finally:
            self._free.put(seat)


def _job_bytes(job: Job) -> int:
    return sum(aligned(job.count * window.dtype.itemsize) for window in job.step.windows)
