"""Merge: run every job of a plan on several threads, in output order."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mergetool.checkpoint import system
from mergetool.engine.bundles import Bundle, Operands, bundles, pieces
from mergetool.engine.device import CPU, Device
from mergetool.engine.feeding.values import Reader
from mergetool.engine.fidelity import Fidelity
from mergetool.engine.jobs import Job, Quantise
from mergetool.engine.memory import workers
from mergetool.engine.method_calls import Caller
from mergetool.engine.movements import Movements
from mergetool.engine.quantisation import Phases, Weights
from mergetool.engine.runs import Measure, NonFinite, Outcome, Run, Sink
from mergetool.engine.threads import TorchThreads
from mergetool.engine.worker import Finished, Worker
from mergetool.ops.movement import Movement
from mergetool.recipe.plan import Plan

if TYPE_CHECKING:
    from mergetool.engine.gpu import Room

# Nothing is read ahead by hand: the kernel sees sequential readers and does it better. Three cold 12.3 GB files, 2 cores:
# 22-27 s, and 30-45 s when chunks were announced with POSIX_FADV_WILLNEED, which cost twice the kernel time.


def run(
    plan: Plan,
    writer: Sink,
    *,
    threads: int | None = None,
    reader: Reader = "auto",
    non_finite: NonFinite = "refuse",
    device: Device = CPU,
    measure: Measure = "sample",
    compared: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Compute every tensor of ``plan`` into ``writer``, which the caller commits.

    ``measure`` says on how much of the CPU's work movements are measured (a GPU measures all it does), ``compared`` whether
    what storing changed is. ``progress`` is called from this thread with the bytes read and written since the last call. The bytes written depend on ``threads``, ``reader`` and ``device`` in nothing; of the movements,
    the energies' last digits depend on the device. Raises NonFiniteError for NaN or infinity in an input or from overflow
    unless they are to be kept, DeviceError for a GPU that fails, and whatever reading and writing raise; after an
    exception nothing more is written.
    """
    (outcome,) = run_together(
        [(plan, writer, "")],
        threads=threads,
        reader=reader,
        non_finite=non_finite,
        device=device,
        measure=measure,
        compared=compared,
        progress=progress,
    )
    return outcome


def run_together(
    items: Sequence[tuple[Plan, Sink, str]],
    *,
    threads: int | None = None,
    reader: Reader = "auto",
    non_finite: NonFinite = "refuse",
    device: Device = CPU,
    measure: Measure = "sample",
    compared: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """`run` for the plans of one of `bundles.passes`, in one pass over their inputs.

    An item is a plan, where its bytes go, and what errors call that. The bytes are those of `run`; what several plans read or compute
    alike is read or computed once.
    """
    device = CPU if compared else device
    system.keep_freed_memory()  # quantising makes megabytes of values at a time
    runs = [
        Run(
            plan,
            writer,
            reader,
            non_finite,
            measure,
            Weights([tensor for tensor in plan.tensors if tensor.quantiser]),
            Caller(device),
            compared,
            name,
        )
        for plan, writer, name in items
    ]
    # The parallelism is over chunks; threads inside an operation would fight for the cores.
    with TorchThreads() as torch_threads:
        if device.is_gpu or any(run.multiplies for run in runs):
            torch_threads.one()
        _Workers(runs, device, threads, torch_threads).run(progress)
    return [run.outcome for run in runs]


class _Workers:
    def __init__(self, runs: Sequence[Run], device: Device, threads: int | None, torch_threads: TorchThreads) -> None:
        plans = [run.plan for run in runs]
        self._runs = runs
        self._device = device
        self._threads = workers(plans, threads)
        self._torch_threads = torch_threads
        self._suits: Callable[[Job | Quantise], bool] = lambda _: False
        self._room: Room | None = None
        if device.is_gpu:
            from mergetool.engine import gpu  # imports torch, which takes a second

            self._suits, self._room = gpu.suits, gpu.room(plans[0], device)  # a GPU's passes are of one plan
        self._work_list = bundles(plans, self._room.chunk if self._room else None)
        sizes = Counter(work.phase for work in self._work_list if work.phase is not None)
        self._phases = Phases([sizes[phase] for phase in range(len(sizes))])
        on_gpu = [self._suits(work.jobs[0][1]) for work in self._work_list]
        self._for_cpu = iter([i for i, suited in enumerate(on_gpu) if not suited])
        self._for_gpu = iter([i for i, suited in enumerate(on_gpu) if suited])
        self._spare: Worker | None = None
        self._redoing = threading.Lock()
        self._movements: dict[tuple[int, int], Movement] = {}  # of a run's part of a piece of work
        self._moved = 0
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def run(self, progress: Callable[[int], None]) -> None:
        for run in self._runs:
            for tensor in run.plan.tensors:
                if tensor.constant is not None:
                    run.writer.write(tensor.name, 0, memoryview(tensor.constant))
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
        for number, run in enumerate(self._runs):
            run.outcome.movements = Movements.of(self._moves(number), sampled=self._passes_over(number))
            run.outcome.errors = {
                tensor.name: Fidelity.total(run.errors[tensor.name])
                for tensor in run.plan.tensors
                if tensor.name in run.errors
            }
            run.outcome.search_gain = run.weights.search_gain()

    def _end(self) -> None:
        self._stop.set()
        self._phases.stop()

    def _passes_over(self, number: int) -> bool:
        """Whether a run left some merged elements unmeasured: it measures a sample on the CPU."""
        if self._runs[number].measure != "sample":
            return False
        on_cpu = (job for _, job in self._jobs_of(number) if not self._suits(job))
        return any(not job.sampled for job in on_cpu if isinstance(job, Quantise) or _is_stored(job))

    def _jobs_of(self, number: int) -> Iterator[tuple[int, Job | Quantise]]:
        """A run's jobs, each with the index of the work that it is part of."""
        for index, work in enumerate(self._work_list):
            for member, job in work.jobs:
                if member == number:
                    yield index, job

    def _moves(self, number: int) -> Iterator[tuple[tuple[str, str], Movement]]:
        """The movements of the anchor's elements: of plain outputs by job, then of quantised ones, each in file order."""
        for index, job in self._jobs_of(number):
            if isinstance(job, Job) and (index, number) in self._movements:
                yield (job.tensor.name, job.step.part), self._movements[index, number]
        run = self._runs[number]
        for tensor in run.plan.tensors:
            for step in tensor.steps:
                place = (tensor.name, step.part)
                for movement in run.movements.get(place, ()):
                    yield place, movement

    def _take_moved(self) -> int:
        with self._lock:
            moved, self._moved = self._moved, 0
        return moved

    def _work(self) -> None:
        try:
            worker = None
            while (index := self._take(self._for_cpu)) is not None:
                work = self._work_list[index]
                worker = worker or Worker(self._runs, self._work_list, self._torch_threads)
                if work.phase is not None and not self._phases.enter(work.phase):
                    return
                for part in pieces(work):
                    for (number, _), done in zip(part.jobs, worker.do(part), strict=True):
                        self._done(index, number, *done)
                if work.phase is not None:
                    self._phases.leave(work.phase)
        except BaseException as error:
            self._fail(error)

    def _drive(self, name: str) -> None:
        from mergetool.engine import gpu

        assert self._room is not None
        (run,) = self._runs
        tasks = gpu.Tasks(self._take_plain, self._redo, self._done_by_gpu, self._off_device, self._fail)
        try:
            gpu.Driver(run.plan, run.writer.write, tasks, name, self._room, measured=run.measure != "off").work()
        except BaseException as error:
            self._fail(error)

    def _take(self, queue: Iterator[int]) -> int | None:
        with self._lock:
            return None if self._stop.is_set() else next(queue, None)

    def _take_plain(self) -> tuple[int, Job] | None:
        index = self._take(self._for_gpu)
        if index is None:
            return None
        ((_, job),) = self._work_list[index].jobs
        assert isinstance(job, Job)
        return index, job

    def _done(self, index: int, number: int, moved: int, movement: Movement | None) -> None:
        with self._lock:
            self._moved += moved
            if movement is not None:
                self._movements[index, number] = movement

    def _done_by_gpu(self, index: int, job: Job, moved: int, movement: Movement | None, capped: int) -> None:
        self._done(index, 0, moved, movement)
        if capped:
            self._runs[0].note(self._runs[0].outcome.capped, job.tensor.name, capped)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self._end()

    def _off_device(self, job: Job) -> None:
        self._runs[0].note(self._runs[0].outcome.off_device, job.tensor.name, job.count)

    def _redo(self, job: Job) -> Finished:
        """A GPU's job by the CPU, one at a time."""
        with self._redoing:
            self._spare = self._spare or Worker(self._runs, self._work_list, self._torch_threads)
            work = Bundle(((0, job),), Operands.of([(self._runs[0].plan, job.step)]))
            done = [finished for part in pieces(work) for finished in self._spare.do(part)]
        movements = [movement for _, movement in done if movement is not None]
        return sum(moved for moved, _ in done), Movement.total(movements) if movements else None


def _is_stored(job: Job) -> bool:
    """Whether a job stores its merged elements, and so knows their movement."""
    return job.phase is None and job.step.base is not None
