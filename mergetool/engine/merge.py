"""Merge: run every step of a plan in chunks that stay in the cache, on several threads, in output order."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch

from mergetool.checkpoint.dtypes import F32, DType
from mergetool.engine import quantising
from mergetool.engine.movements import Movements
from mergetool.engine.quantising import Phases, Piece, Weight
from mergetool.engine.reading import Fetched, Method, ValueReader, fetcher
from mergetool.errors import NonFiniteError
from mergetool.ops.cpu import CpuOps
from mergetool.ops.movement import Movement
from mergetool.ops.program import Load, Program, Scale, Subtract
from mergetool.ops.rounding import NEAREST, ErrorFeedback, Rounding, Stochastic, stream_key
from mergetool.quant.encoding import Floats, Octets
from mergetool.recipe.options import Options
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import COPY, OutputTensor, Step

# 512 Ki elements: 1 MB of bf16 an operand, 2 MB a register. Larger chunks leave the cache, smaller ones pay for calls.
CHUNK = 1 << 19
# Error feedback needs whole rows, and many of them at a time: 6 ns an element of 2048 rows, 46 of 128.
ROWS_CHUNK = 1 << 22
# Nothing is read ahead by hand: the kernel sees sequential readers and does it better. Three cold 12.3 GB files, 2 cores:
# 22-27 s, and 30-45 s when chunks were announced with POSIX_FADV_WILLNEED, which cost twice the kernel time.


class Output(Protocol):
    """Where a run's bytes go: a CheckpointWriter, or something that compares them with a file's."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Take the bytes [start, start + len(data)) of tensor ``name``; called from several threads."""


NonFinite = Literal["refuse", "keep"]


@dataclass(frozen=True, slots=True)
class Job:
    """Elements ``[start, start + count)`` of one step of one output tensor.

    Those of a quantised tensor are only collected, in the phase that fills it.
    """

    tensor: OutputTensor
    step: Step
    start: int
    count: int
    rounding: Rounding
    phase: int | None = None


@dataclass(frozen=True, slots=True)
class Quantise:
    """A piece of a quantised output tensor, to be encoded, or before that to have its scale searched for."""

    piece: Piece
    rounding: Rounding
    phase: int
    searching: bool = False

    @property
    def count(self) -> int:
        """Elements, padding included."""
        return self.piece.stored * -(-self.piece.tensor.shape[1] // _WIDEST_BLOCK) * _WIDEST_BLOCK


_WIDEST_BLOCK = 32


@dataclass
class Outcome:
    """What a run has to say beyond its output.

    ``capped`` counts, per output tensor, elements that were beyond an FP8 output's range and became its largest
    value; ``non_finite`` counts NaN and infinities that ``--nonfinite keep`` let through. ``movements`` is what became of
    the first model's elements, where they were merged and the run measured.
    """

    capped: dict[str, int] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    movements: Movements = field(default_factory=Movements)


def default_threads() -> int:
    """The processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def memory_needed(plan: Plan, threads: int) -> int:
    """Bytes of anonymous memory that ``run`` allocates, over the interpreter's own, for ``threads`` workers."""
    windows = max((len(step.windows) for tensor in plan.tensors for step in tensor.steps), default=1)
    decoded = max(
        (sum(w.encoding is not None for w in step.windows) for tensor in plan.tensors for step in tensor.steps),
        default=0,
    )
    elements = max((job.count for job in jobs(plan)), default=0)
    feedback = 6 if plan.options.rounding == "error-feedback" else 0
    held = largest_weight(plan)
    encoding = 16 if held else 0
    each = 4 * (plan.registers + 1) + 4 + 4 * windows + 6 * decoded + feedback + encoding
    return 4 * held + threads * (elements * each + 2_000_000)


def largest_weight(plan: Plan) -> int:
    """Elements of the largest output tensor that is quantised, whose float32 values are held; 0 where none is."""
    return max((tensor.shape[0] * tensor.shape[1] for tensor in plan.tensors if tensor.quantiser), default=0)


def run(
    plan: Plan,
    writer: Output,
    *,
    threads: int | None = None,
    method: Method = "auto",
    non_finite: NonFinite = "refuse",
    measured: bool = True,
    progress: Callable[[int], None] = lambda _: None,
) -> Outcome:
    """Compute every tensor of ``plan`` into ``writer``, which the caller commits.

    ``measured`` says whether movements are wanted. ``progress`` is called from this thread with the bytes read and
    written since the last call. Neither the bytes written nor the movements depend on ``threads`` or ``method``. Raises NonFiniteError for NaN or infinity in an input or from
    overflow unless they are to be kept, and whatever reading and writing raise; after an exception nothing more is
    written.
    """
    workers = _Workers(plan, writer, method, non_finite, measured=measured)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the parallelism is over chunks; threads inside an operation would fight for the cores
    try:
        workers.run(threads or default_threads(), progress)
    finally:
        torch.set_num_threads(torch_threads)
    return workers.outcome


def jobs(plan: Plan) -> Iterator[Job | Quantise]:
    """The work in output order, in chunks that depend on the plan alone; phases are numbered from 0."""
    phase = 0
    for tensor in plan.tensors:
        if tensor.quantiser is None:
            yield from _chunks(tensor, plan.options)
            continue
        for job in _chunks(tensor, plan.options):
            yield replace(job, phase=phase)
        for searching in (True, False) if plan.options.scale_search else (False,):
            phase += 1
            for piece in quantising.pieces(tensor, ROWS_CHUNK if plan.options.rounding == "error-feedback" else CHUNK):
                yield Quantise(piece, _rounding_of(piece, plan.options), phase, searching)
        phase += 1


def _rounding_of(piece: Piece, options: Options) -> Rounding:
    assert piece.tensor.quantiser is not None
    width = piece.tensor.quantiser.padded((piece.tensor.shape[0], piece.tensor.shape[1]))[1]
    if options.rounding == "stochastic":
        return Stochastic(stream_key(options.seed, piece.tensor.name), piece.row * width)
    return ErrorFeedback(width) if options.rounding == "error-feedback" else NEAREST


def _chunks(tensor: OutputTensor, options: Options) -> Iterator[Job]:
    row = tensor.shape[-1] if tensor.shape else 1
    key = stream_key(options.seed, tensor.name)
    for step in tensor.steps:
        rounded = step.program is not None and tensor.quantiser is None
        whole_rows = options.rounding == "error-feedback" and rounded
        # A part of a fused 1-D tensor is a row of its own: a row never goes on from one part to the next.
        rows = min(row, step.elements)
        chunk = max(1, ROWS_CHUNK // rows) * rows if whole_rows and rows else CHUNK
        if not whole_rows and rows and any(window.encoding for window in step.windows):
            chunk = max(1, CHUNK // rows) * rows  # no row is decoded twice
        for start in range(0, step.elements, chunk):
            rounding: Rounding = NEAREST
            if options.rounding == "stochastic":
                rounding = Stochastic(key, step.first + start)
            elif whole_rows:
                rounding = ErrorFeedback(rows)
            yield Job(tensor, step, start, min(chunk, step.elements - start), rounding)


class _Workers:
    def __init__(self, plan: Plan, writer: Output, method: Method, non_finite: NonFinite, *, measured: bool) -> None:
        self.plan = plan
        self.writer = writer
        self.method = method
        self.non_finite = non_finite
        self.measured = measured
        self.outcome = Outcome()
        self._jobs: list[Job | Quantise] = list(jobs(plan))
        sizes = Counter(job.phase for job in self._jobs if job.phase is not None)
        self.phases = Phases([sizes[phase] for phase in range(len(sizes))])
        self.weight = Weight(largest_weight(plan))
        self._movements: dict[int, Movement] = {}
        self._next = 0
        self._moved = 0
        self._failure: BaseException | None = None
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._files = [file for model in plan.inputs for file in model.checkpoint.files]

    def run(self, threads: int, progress: Callable[[int], None]) -> None:
        pool = [threading.Thread(target=self._work, name=f"merge-{i}") for i in range(threads)]
        for tensor in self.plan.tensors:
            if tensor.constant is not None:
                self.writer.write(tensor.name, 0, memoryview(tensor.constant))
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
        self.outcome.movements = Movements.of(
            ((job.tensor.name, job.step.part), self._movements[i])
            for i, job in enumerate(self._jobs)
            if isinstance(job, Job) and i in self._movements
        )

    def _take_moved(self) -> int:
        with self._lock:
            moved, self._moved = self._moved, 0
        return moved

    def _work(self) -> None:
        try:
            capacity = max((job.count for job in self._jobs), default=0)
            worker = _Worker(self, CpuOps(capacity=capacity, registers=self.plan.registers + 1))
            while not self._stop.is_set():
                with self._lock:
                    index, self._next = self._next, self._next + 1
                if index >= len(self._jobs):
                    return
                moved, movement = worker.do(self._jobs[index])
                with self._lock:
                    self._moved += moved
                    if movement is not None:
                        self._movements[index] = movement
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._end()

    def _end(self) -> None:
        self._stop.set()
        self.phases.stop()

    def new_reader(self) -> ValueReader:
        return ValueReader(fetcher(self.method, self._files))

    def note(self, counts: dict[str, int], tensor: str, count: int) -> None:
        with self._lock:
            counts[tensor] = counts.get(tensor, 0) + count


class _Worker:
    """One thread's registers, buffers and reading method."""

    def __init__(self, run: _Workers, ops: CpuOps) -> None:
        self.run = run
        self.ops = ops
        self.reader = run.new_reader()

    def do(self, job: Job | Quantise) -> tuple[int, Movement | None]:
        """Do one job; returns the bytes read and written, and what it did to the first model."""
        if job.phase is None:
            assert isinstance(job, Job)
            return self._compute(job)
        if not self.run.phases.enter(job.phase):
            return 0, None
        done = self._compute(job) if isinstance(job, Job) else self._quantise(job)
        self.run.phases.leave(job.phase)
        return done

    def _compute(self, job: Job) -> tuple[int, Movement | None]:
        fetched = [
            self.reader.fetch(slot, self.run.plan.inputs[window.input].checkpoint, window, job.start, job.count)
            for slot, window in enumerate(job.step.windows)
        ]
        raw, dtypes = [found.view for found in fetched], [found.dtype for found in fetched]
        bits = job.tensor.dtype.bits
        at = (job.step.first + job.start) * bits // 8
        movement = None
        if job.step.program is None:
            if dtypes[0].blendable:
                self._execute(COPY, raw, dtypes)
                self._check(job, raw, dtypes)
            out = raw[0]
        else:
            self._execute(job.step.program, raw, dtypes)
            self._check(job, raw, dtypes)
            if job.phase is not None:
                return self._collect(job, fetched), None
            out, beyond = self.ops.store(0, job.tensor.dtype, job.rounding)
            if beyond:
                self._beyond(job, beyond)
            if job.step.base is not None and self.run.measured:
                first = self.run.plan.registers
                self.ops.load(first, raw[job.step.base], dtypes[job.step.base])
                movement = self.ops.measure(0, first, job.tensor.dtype)
        self.run.writer.write(job.tensor.name, at, out)
        return len(out) + self._release(fetched), movement

    def _collect(self, job: Job, fetched: list[Fetched]) -> int:
        values, _ = self.ops.store(0, F32)
        self.run.weight.fill(job.tensor, job.step.first + job.start, np.frombuffer(values, np.float32))
        return self._release(fetched)

    def _release(self, fetched: list[Fetched]) -> int:
        for found in fetched:
            self.reader.release(found)
        return sum(found.nbytes for found in fetched)

    def _quantise(self, job: Quantise) -> tuple[int, Movement | None]:
        weight, piece = self.run.weight, job.piece
        assert piece.tensor.quantiser is not None

        def round_to(values: Floats, dtype: DType) -> Octets:
            self.ops.load(0, np.ascontiguousarray(values).data.cast("B"), F32)
            out, _ = self.ops.store(0, dtype, job.rounding)
            return np.frombuffer(out, np.uint8).reshape(values.shape)

        if job.searching:
            weight.search(piece, round_to)
            return 0, None
        scale = weight.scale(piece.tensor)
        raw = quantising.encode(piece.tensor.quantiser, weight.rows(piece), piece, scale, round_to)
        return quantising.write(piece, raw, scale, self.run.writer.write), None

    def _execute(self, program: Program, raw: list[memoryview], dtypes: list[DType]) -> None:
        ops = self.ops
        for step in program.instructions:
            if isinstance(step, Load):
                ops.load(step.register, raw[step.model], dtypes[step.model])
            elif isinstance(step, Scale):
                ops.scale(step.register, step.factor)
            elif isinstance(step, Subtract):
                ops.subtract(step.register, step.other)
            else:
                ops.add(step.register, step.other)

    def _check(self, job: Job, raw: list[memoryview], dtypes: list[DType]) -> None:
        if self.ops.is_finite(0):
            return
        if self.run.non_finite == "keep":
            count, _ = self.ops.first_non_finite(0)
            self.run.note(self.run.outcome.non_finite, job.tensor.name, count)
            return
        for window, view, dtype in zip(job.step.windows, raw, dtypes, strict=True):
            self.ops.load(0, view, dtype)
            if not self.ops.is_finite(0):
                model = self.run.plan.inputs[window.input].name
                count, first = self.ops.first_non_finite(0)
                raise NonFiniteError(
                    f'{model}: tensor "{window.tensor}" holds NaN or infinity ({count} of the {job.count} elements '
                    f"looked at, the first at element {window.start // dtype.itemsize + job.start + first}); "
                    "mend the file, or pass --nonfinite keep."
                )
        raise NonFiniteError(
            f'tensor "{job.tensor.name}" overflows float32 although its inputs are finite; use smaller multipliers.'
        )

    def _beyond(self, job: Job, count: int) -> None:
        dtype = job.tensor.dtype
        if dtype.bits == 8:
            self.run.note(self.run.outcome.capped, job.tensor.name, count)
        elif self.run.non_finite == "keep":
            self.run.note(self.run.outcome.non_finite, job.tensor.name, count)
        else:
            raise NonFiniteError(
                f'tensor "{job.tensor.name}": {count} of {job.count} elements are beyond {dtype.name}\'s largest value '
                f"{dtype.largest:g}; write bf16 with --dtype bf16, or pass --nonfinite keep."
            )
