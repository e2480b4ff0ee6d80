"""Merge: run every job of a plan on several threads, in output order."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from mergetool.checkpoint import system
from mergetool.engine import gpu
from mergetool.engine.calling import Caller
from mergetool.engine.device import CPU, Device
from mergetool.engine.fidelity import Fidelity
from mergetool.engine.jobs import Job, Quantise, jobs, pieces
from mergetool.engine.memory import workers
from mergetool.engine.movements import Movements
from mergetool.engine.quantising import Phases, Weights
from mergetool.engine.reading import Method
from mergetool.engine.worker import Done, Measure, NonFinite, Outcome, Output, Run, Worker
from mergetool.ops.movement import Movement
from mergetool.recipe.plan import Plan

# Nothing is read ahead by hand: the kernel sees sequential readers and does it better. Three cold 12.3 GB files, 2 cores:
# 22-27 s, and 30-45 s when chunks were announced with POSIX_FADV_WILLNEED, which cost twice the kernel time.


def run(
    plan: Plan,
    writer: Output,
    *,
    threads: int | None = None,
    method: Method = "auto",
    non_finite: NonFinite = "refuse",
    device: Device = CPU,
    measure: Measure = "sample",
    compared: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Compute every tensor of ``plan`` into ``writer``, which the caller commits.

    ``measure`` says on how much of the CPU's work movements are measured (a GPU measures all it does), ``compared`` whether
    what storing changed is. ``progress`` is called from this thread with the bytes read and written since the last call. The bytes written depend on ``threads``, ``method`` and ``device`` in nothing; of the movements,
    the energies' last digits depend on the device. Raises NonFiniteError for NaN or infinity in an input or from overflow
    unless they are to be kept, DeviceError for a GPU that fails, and whatever reading and writing raise; after an
    exception nothing more is written.
    """
    device = CPU if compared else device
    system.keep_freed_memory()  # quantising makes megabytes of values at a time
    pool = _Workers(plan, writer, method, non_finite, device, threads, measure=measure)
    pool.shared.compared = compared
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallelism is over chunks; threads inside an operation would fight for the cores
    try:
        pool.run(progress)
    finally:
        torch.set_num_threads(torch_threads)
    return pool.shared.outcome


class _Workers:
    def __init__(
        self,
        plan: Plan,
        writer: Output,
        method: Method,
        non_finite: NonFinite,
        device: Device,
        threads: int | None,
        *,
        measure: Measure,
    ) -> None:
        self._device = device
        self._threads = workers(plan, threads)
        self._room = gpu.room(plan, device) if device.is_gpu else None
        self._jobs = list(jobs(plan, self._room.chunk if self._room else None))
        sizes = Counter(job.phase for job in self._jobs if job.phase is not None)
        self._phases = Phases([sizes[phase] for phase in range(len(sizes))])
        on_gpu = [device.is_gpu and gpu.suits(job) for job in self._jobs]
        self._for_cpu = iter([i for i, suited in enumerate(on_gpu) if not suited])
        self._for_gpu = iter([i for i, suited in enumerate(on_gpu) if suited])
        self._capacity = max((job.capacity for job in self._jobs), default=0)
        self._spare: Worker | None = None
        self._redoing = threading.Lock()
        weights = Weights([tensor for tensor in plan.tensors if tensor.quantiser])
        self.shared = Run(plan, writer, method, non_finite, measure, plan.registers, weights, Caller(device))
        self._movements: dict[int, Movement] = {}
        self._moved = 0
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._lock = self.shared.lock

    def run(self, progress: Callable[[int], None]) -> None:
        for tensor in self.shared.plan.tensors:
            if tensor.constant is not None:
                self.shared.writer.write(tensor.name, 0, memoryview(tensor.constant))
        pool = [threading.Thread(target=self._work, name=f"merge-{i}") for i in range(self._threads)]
        pool += [threading.Thread(target=self._drive, args=[name], name=f"merge-{name}") for name in self._device.names]
        for thread in pool:
            thread.start()
        try:
            for thread in pool:
                while thread.is_alive():
                    thread.join(timeout=0.05)
                    progress(self._take_moved())
        finally:
            # Also on Ctrl-C, which only this thread sees: the others finish their chunk and stop.
            self._end()
            for thread in pool:
                thread.join()
        if self._failure is not None:
            raise self._failure
        progress(self._take_moved())
        self.shared.outcome.movements = Movements.of(self._moves(), sampled=self._passes_over())
        self.shared.outcome.errors = {
            tensor.name: Fidelity.total(self.shared.errors[tensor.name])
            for tensor in self.shared.plan.tensors
            if tensor.name in self.shared.errors
        }
        self.shared.outcome.search_gain = self.shared.weights.search_gain()

    def _end(self) -> None:
        self._stop.set()
        self._phases.stop()

    def _passes_over(self) -> bool:
        """Whether some of what was merged was not measured: of a sample on the CPU."""
        if self.shared.measure != "sample":
            return False
        on_cpu = (job for job in self._jobs if not (self._device.is_gpu and gpu.suits(job)))
        return any(not job.sampled for job in on_cpu if isinstance(job, Quantise) or _is_stored(job))

    def _moves(self) -> Iterator[tuple[tuple[str, str], Movement]]:
        """What became of the first model's elements: of plain outputs by job, then of quantised ones, each in file order."""
        for index, job in enumerate(self._jobs):
            if isinstance(job, Job) and index in self._movements:
                yield (job.tensor.name, job.step.part), self._movements[index]
        for tensor in self.shared.plan.tensors:
            for step in tensor.steps:
                place = (tensor.name, step.part)
                for movement in self.shared.movements.get(place, ()):
                    yield place, movement

    def _take_moved(self) -> int:
        with self._lock:
            moved, self._moved = self._moved, 0
        return moved

    def _work(self) -> None:
        try:
            worker = None
            while (taken := self._take(self._for_cpu)) is not None:
                index, job = taken
                worker = worker or Worker(self.shared, self._capacity)
                if job.phase is not None and not self._phases.enter(job.phase):
                    return
                for part in pieces(job) if isinstance(job, Job) else [job]:
                    self._done(index, job, *worker.do(part))
                if job.phase is not None:
                    self._phases.leave(job.phase)
        except BaseException as error:
            self._fail(error)

    def _drive(self, name: str) -> None:
        assert self._room is not None
        tasks = gpu.Tasks(self._take_plain, self._redo, self._done, self._off_device, self._fail)
        plan, write = self.shared.plan, self.shared.writer.write
        try:
            gpu.Driver(plan, write, tasks, name, self._room, measured=self.shared.measure != "off").work()
        except BaseException as error:
            self._fail(error)

    def _take(self, queue: Iterator[int]) -> tuple[int, Job | Quantise] | None:
        with self._lock:
            index = None if self._stop.is_set() else next(queue, None)
            return None if index is None else (index, self._jobs[index])

    def _take_plain(self) -> tuple[int, Job] | None:
        taken = self._take(self._for_gpu)
        if taken is None:
            return None
        assert isinstance(taken[1], Job)
        return taken[0], taken[1]

    def _done(self, index: int, job: Job | Quantise, moved: int, movement: Movement | None, capped: int = 0) -> None:
        with self._lock:
            self._moved += moved
            if movement is not None:
                self._movements[index] = movement
        if capped and isinstance(job, Job):
            self.shared.note(self.shared.outcome.capped, job.tensor.name, capped)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._end()

    def _off_device(self, job: Job) -> None:
        self.shared.note(self.shared.outcome.off_device, job.tensor.name, job.count)

    def _redo(self, job: Job) -> Done:
        """A GPU's job by the CPU, one at a time."""
        with self._redoing:
            self._spare = self._spare or Worker(self.shared, self._capacity)
            done = [self._spare.do(part) for part in pieces(job)]
        movements = [movement for _, movement in done if movement is not None]
        return sum(moved for moved, _ in done), Movement.total(movements) if movements else None


def _is_stored(job: Job) -> bool:
    """Whether a job stores what it merged, and so knows what became of it."""
    return job.phase is None and job.step.base is not None
