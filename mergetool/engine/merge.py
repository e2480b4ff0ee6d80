"""Merge: run every job of a plan on several threads, in output order."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import torch

from mergetool.engine.device import CPU, Device
from mergetool.engine.jobs import CHUNK, Job, jobs
from mergetool.engine.memory import default_threads, feeders, largest_weight
from mergetool.engine.movements import Movements
from mergetool.engine.quantising import Phases, Weight
from mergetool.engine.reading import Method
from mergetool.engine.worker import GpuWorker, NonFinite, Outcome, Output, Run, Worker
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
    measured: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Compute every tensor of ``plan`` into ``writer``, which the caller commits.

    ``measured`` says whether movements are wanted. ``progress`` is called from this thread with the bytes read and
    written since the last call. The bytes written depend on ``threads``, ``method`` and ``device`` in nothing; of the movements,
    the energies' last digits depend on the device. Raises NonFiniteError for NaN or infinity in an input or from overflow
    unless they are to be kept, DeviceError for a GPU that fails, and whatever reading and writing raise; after an
    exception nothing more is written.
    """
    workers = _Workers(plan, writer, method, non_finite, device, threads, measured=measured)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallelism is over chunks; threads inside an operation would fight for the cores
    try:
        workers.run(progress)
    finally:
        torch.set_num_threads(torch_threads)
    return workers.shared.outcome


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
        measured: bool,
    ) -> None:
        self._device = device
        self._threads, chunk = threads or default_threads(), CHUNK
        if device.is_gpu:
            self._threads, chunk = feeders(plan, threads, device)
        self._jobs = list(jobs(plan, chunk if device.is_gpu else None))
        sizes = Counter(job.phase for job in self._jobs if job.phase is not None)
        self._phases = Phases([sizes[phase] for phase in range(len(sizes))])
        self.shared = Run(
            plan,
            writer,
            method,
            non_finite,
            measured,
            registers=plan.registers,
            capacity=max((job.capacity for job in self._jobs), default=0),
            gpu_chunk=chunk,
            weight=Weight(largest_weight(plan)),
        )
        self._movements: dict[int, Movement] = {}
        self._next = 0
        self._moved = 0
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._lock = self.shared.lock

    def run(self, progress: Callable[[int], None]) -> None:
        for tensor in self.shared.plan.tensors:
            if tensor.constant is not None:
                self.shared.writer.write(tensor.name, 0, memoryview(tensor.constant))
        pool = [threading.Thread(target=self._work, args=[i], name=f"merge-{i}") for i in range(self._threads)]
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
        self.shared.outcome.movements = Movements.of(
            ((job.tensor.name, job.step.part), self._movements[i])
            for i, job in enumerate(self._jobs)
            if isinstance(job, Job) and i in self._movements
        )
        self.shared.outcome.search_gain = self.shared.weight.search_gain()

    def _end(self) -> None:
        self._stop.set()
        self._phases.stop()

    def _take_moved(self) -> int:
        with self._lock:
            moved, self._moved = self._moved, 0
        return moved

    def _work(self, number: int) -> None:
        try:
            worker = self._worker(number)
            while not self._stop.is_set():
                with self._lock:
                    index, self._next = self._next, self._next + 1
                if index >= len(self._jobs):
                    return
                job = self._jobs[index]
                if job.phase is not None and not self._phases.enter(job.phase):
                    return
                moved, movement = worker.do(job)
                if job.phase is not None:
                    self._phases.leave(job.phase)
                with self._lock:
                    self._moved += moved
                    if movement is not None:
                        self._movements[index] = movement
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._end()

    def _worker(self, number: int) -> Worker | GpuWorker:
        if self._device.is_gpu:
            return GpuWorker(self.shared, self._device.names[number % len(self._device.names)])
        return Worker.on_cpu(self.shared, self.shared.capacity)
