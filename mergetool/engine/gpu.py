"""Merge on a GPU: reading, copying in, arithmetic, copying out and writing, each going on while the others do.

Many threads read (and wait for the disk), one launches: Python's lock lets only one thread of a process act at a time, and
with sixteen that each did a whole job, an H100 was fed at 15 GB/s where its readers alone reach 29.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mergetool.engine.device import Device, free_memory
from mergetool.engine.threads import default_threads
from mergetool.errors import DeviceError
from mergetool.ops.contract import execute
from mergetool.ops.movement import Movement
from mergetool.ops.rounding import ErrorFeedback
from mergetool.recipe.plan import Plan

if TYPE_CHECKING:
    from mergetool.engine.jobs import Job, Quantise
    from mergetool.ops.cuda import CudaOps

CHUNK = 1 << 24
"""Elements of a job: 32 MB of bf16 an operand. Of 2 Mi to 16 Mi each larger one was faster: less Python for each byte."""

SLOTS = 6
"""Jobs under way at once: some being read, one computed, some written. Six took 1.72 s where four took 2.03 (H100, 16 cores)."""

PIECE = 16 << 20
"""Bytes that one thread reads at once."""

READERS = 16
WRITERS = 4


@dataclass(frozen=True, slots=True)
class Room:
    """How much a GPU holds of a merge: ``slots`` jobs of at most ``chunk`` elements, of ``element`` bytes each."""

    slots: int
    chunk: int
    element: int

    @property
    def pinned(self) -> int:
        """Bytes of page-locked host memory, at most."""
        return self.slots * self.chunk * self.element


def readers() -> int:
    """How many threads read: more than this machine's processors where they are few, since they wait for the disk."""
    return max(4, min(READERS, default_threads()))


def room(plan: Plan, device: Device) -> Room:
    """What fits into the memory that may be taken of each GPU; no slot at all where not even a small job does."""
    widths = [
        sum(window.dtype.bits for window in step.windows) + tensor.dtype.bits
        for tensor in plan.tensors
        for step in tensor.steps
        if step.program is not None
    ]
    element = max(widths, default=16) // 8
    allowed = min(device.memory or free_memory(name) * 4 // 5 for name in device.names)
    chunk = CHUNK
    while chunk > 1 << 16 and 3 * chunk * element > allowed:
        chunk //= 2
    return Room(min(SLOTS, allowed // (chunk * element)), chunk, element)


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


@dataclass
class _Slot:
    """Memory for one job's operands, page-locked and on the device, and what computes on them."""

    ops: CudaOps
    pinned: Tensor  # uint8
    operands: Tensor  # uint8
    reads: list[Future[None]] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # where in the two each window's bytes begin
    size: int = 0


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
        self._free: queue.SimpleQueue[_Slot] = queue.SimpleQueue()

    def work(self) -> None:
        """Do jobs until there are none left, or the run stops; raises DeviceError when the GPU fails."""
        try:
            self._work()
        except torch.AcceleratorError as error:
            raise failure(self._name, error) from None

    def _work(self) -> None:
        reading: deque[tuple[_Slot, int, Job]] = deque()
        more = self._allocate() > 0
        if not more:
            self._without_device()
            return
        with ThreadPoolExecutor(readers(), "read") as pool, ThreadPoolExecutor(WRITERS, "write") as writers:
            while True:
                while more and (not reading or not self._free.empty()):
                    slot = self._free.get()
                    taken = self._tasks.take()
                    if taken is None:
                        more = False
                        break
                    self._read(slot, taken[1], pool)
                    reading.append((slot, *taken))
                if not reading:
                    return
                slot, index, job = reading.popleft()
                try:
                    self._launch(slot, job)
                except torch.OutOfMemoryError:
                    torch.cuda.empty_cache()
                    self._tasks.off_device(job)
                    self._tasks.done(index, job, *self._tasks.redo(job), 0)
                    self._free.put(slot)
                else:
                    writers.submit(self._finish, slot, index, job)

    def _allocate(self) -> int:
        """As many slots as there is memory for; returns their number."""
        from mergetool.ops.cuda import CudaOps

        made = 0
        try:
            for _ in range(self._room.slots):
                size = self._room.chunk * self._room.element + 16 * 16  # each operand begins at a multiple of 16
                operands = torch.empty(size, dtype=torch.uint8, device=self._name)
                pinned = torch.empty(size, dtype=torch.uint8, pin_memory=operands.is_cuda)
                ops = CudaOps(capacity=self._room.chunk, registers=self._registers + 1, device=self._name)
                self._free.put(_Slot(ops, pinned, operands))
                made += 1
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
        return made

    def _without_device(self) -> None:
        while (taken := self._tasks.take()) is not None:
            self._tasks.off_device(taken[1])
            self._tasks.done(*taken, *self._tasks.redo(taken[1]), 0)

    def _read(self, slot: _Slot, job: Job, pool: ThreadPoolExecutor) -> None:
        """Start reading the job's operands, one after the other, each at a multiple of 16 bytes."""
        slot.reads, slot.places, slot.size = [], [], 0
        room = slot.pinned.numpy().data
        for window in job.step.windows:
            file, base = self._plan.inputs[window.input].checkpoint.locate(window.tensor)
            width = window.dtype.itemsize
            offset, size = base + window.start + job.start * width, job.count * width
            for at in range(0, size, PIECE):
                piece = room[slot.size + at : slot.size + min(at + PIECE, size)]
                slot.reads.append(pool.submit(file.read_into, piece, offset + at))
            slot.places.append(slot.size)
            slot.size += -(-size // 16) * 16

    def _launch(self, slot: _Slot, job: Job) -> None:
        for read in slot.reads:
            read.result()
        ops, first = slot.ops, None
        with torch.cuda.stream(ops.stream):
            slot.operands[: slot.size].copy_(slot.pinned[: slot.size], non_blocking=True)
        operands = [
            (slot.operands[at : at + job.count * window.dtype.itemsize], window.dtype)
            for at, window in zip(slot.places, job.step.windows, strict=True)
        ]
        assert job.step.program is not None
        assert not isinstance(job.rounding, ErrorFeedback)
        execute(job.step.program, ops, lambda register, model: ops.take(register, *operands[model]))
        if self._measured and job.step.base is not None:
            first = self._registers
            ops.take(first, *operands[job.step.base])
        ops.launch(0, job.tensor.dtype, job.rounding, first)

    def _finish(self, slot: _Slot, index: int, job: Job) -> None:
        try:
            out, beyond = slot.ops.collect()
            narrow = job.tensor.dtype.bits == 8
            if not slot.ops.is_finite(0) or (beyond and not narrow):
                # The CPU says which model, which element, and whether to keep it.
                moved, movement, beyond = *self._tasks.redo(job), 0
            else:
                at = (job.step.first + job.start) * job.tensor.dtype.itemsize
                self._write(job.tensor.name, at, out)
                moved = len(out) + sum(job.count * window.dtype.itemsize for window in job.step.windows)
                measured = self._measured and job.step.base is not None
                movement = slot.ops.measure(0, self._registers, job.tensor.dtype) if measured else None
            self._tasks.done(index, job, moved, movement, beyond)
        except torch.AcceleratorError as error:
            self._tasks.fail(failure(self._name, error))
        except BaseException as error:
            self._tasks.fail(error)
        finally:
            self._free.put(slot)


def failure(name: str, error: Exception) -> DeviceError:
    """The sentence for a GPU that stopped working."""
    reason = str(error).partition("\n")[0]
    return DeviceError(f"the GPU {name} failed ({reason}); --device cpu gives the same bytes.")
