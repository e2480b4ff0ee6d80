"""One thread of a run on the CPU: it fetches, computes, quantises and writes its jobs."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch

from mergetool.checkpoint.dtypes import F16, DType
from mergetool.checkpoint.inputs import InputFile
from mergetool.engine import quantising
from mergetool.engine.calling import Caller, shape_of
from mergetool.engine.fidelity import Fidelity, read_back
from mergetool.engine.jobs import Job, Quantise
from mergetool.engine.movements import Movements
from mergetool.engine.quantising import Piece, Weights
from mergetool.engine.reading import Fetched, Method, ValueReader, fetcher
from mergetool.errors import NonFiniteError
from mergetool.ops.contract import execute
from mergetool.ops.cpu import CpuOps
from mergetool.ops.movement import Movement
from mergetool.ops.program import Apply, Program
from mergetool.ops.rounding import NEAREST, Rounding
from mergetool.quant.encoding import Floats, Octets
from mergetool.quant.quantiser import Round
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import COPY

NonFinite = Literal["refuse", "keep"]
Measure = Literal["sample", "all", "off"]
"""On how much of a merge to measure what became of the first model's elements."""
Done = tuple[int, Movement | None]
"""Bytes read and written by a job, and what it did to the first model."""


class Output(Protocol):
    """Where a run's bytes go: a CheckpointWriter, or something that compares them with a file's."""

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Take the bytes [start, start + len(data)) of tensor ``name``; called from several threads."""


@dataclass
class Outcome:
    """What a run has to say beyond its output.

    ``capped`` counts, per output tensor, elements that were beyond an FP8 output's range and became its largest
    value; ``non_finite`` counts NaN and infinities that ``--nonfinite keep`` let through; ``off_device`` elements that the GPU
    had no memory for and the CPU computed. ``movements`` is what became of
    the first model's elements, where they were merged and the run measured. ``search_gain`` is the squared error of the
    scales that were searched for, over that of the scales by amax; ``errors`` is what storing changed in every tensor that was
    rounded, where the run compared.
    """

    capped: dict[str, int] = field(default_factory=dict)
    non_finite: dict[str, int] = field(default_factory=dict)
    off_device: dict[str, int] = field(default_factory=dict)
    movements: Movements = field(default_factory=Movements)
    search_gain: float | None = None
    errors: dict[str, Fidelity] = field(default_factory=dict)


@dataclass
class Run:
    """What the workers of one run share."""

    plan: Plan
    writer: Output
    method: Method
    non_finite: NonFinite
    measure: Measure
    registers: int
    weights: Weights
    caller: Caller
    compared: bool = False
    outcome: Outcome = field(default_factory=Outcome)
    errors: dict[str, list[Fidelity]] = field(default_factory=dict)
    movements: dict[tuple[str, str], list[Movement]] = field(default_factory=dict)  # of quantised outputs
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def files(self) -> list[InputFile]:
        """Every file of every input."""
        return [file for model in self.plan.inputs for file in model.checkpoint.files]

    @property
    def decodes(self) -> bool:
        """Whether some values are not stored as such."""
        windows = (window for tensor in self.plan.tensors for step in tensor.steps for window in step.windows)
        return any(window.encoding is not None for window in windows)

    def measures(self, job: Job | Quantise) -> bool:
        """Whether what the delta did is measured on this job."""
        return self.measure == "all" or (self.measure == "sample" and job.sampled)

    def note(self, counts: dict[str, int], tensor: str, count: int) -> None:
        """Add to one of the outcome's counts."""
        with self.lock:
            counts[tensor] = counts.get(tensor, 0) + count

    def moved(self, tensor: str, part: str, movement: Movement) -> None:
        """Note what became of some elements of the first model's ``part`` in a quantised tensor."""
        with self.lock:
            self.movements.setdefault((tensor, part), []).append(movement)

    def compare(self, tensor: str, values: Floats, stored: Floats | None) -> None:
        """Note what storing changed in some elements of a tensor."""
        if stored is not None:
            found = Fidelity.of(values, stored)
            with self.lock:
                self.errors.setdefault(tensor, []).append(found)


class Worker:
    """One thread's registers, buffers and reading method."""

    def __init__(self, run: Run, capacity: int) -> None:
        """With room for jobs of ``capacity`` elements."""
        self._run = run
        self._ops = CpuOps(capacity=capacity, registers=run.registers + 1)
        self._reader = ValueReader(fetcher(run.method, run.files, buffered=run.decodes))

    def do(self, job: Job | Quantise) -> Done:
        """Do one job."""
        return self._compute(job) if isinstance(job, Job) else self._quantise(job)

    def _compute(self, job: Job) -> Done:
        fetched = [
            self._reader.fetch(slot, self._run.plan.inputs[window.input].checkpoint, window, job.start, job.count)
            for slot, window in enumerate(job.step.windows)
        ]
        movement, written = None, 0
        if job.step.program is None:
            if fetched[0].dtype.blendable:
                self._execute(COPY, fetched, job)
                self._check(job, fetched)
            written = self._write(job, fetched[0].raw[0])
        elif job.phase is not None:
            with self._ops.writing(0, self._run.weights.room(job.tensor, job.step.first + job.start, job.count)):
                self._execute(job.step.program, fetched, job)
                largest = self._ops.largest(0)
                if not math.isfinite(largest):
                    self._check(job, fetched)
            self._run.weights.note(job.tensor, largest)
        else:
            out, movement = self._result(job, job.step.program, fetched)
            written = self._write(job, out)
        for found in fetched:
            self._reader.release(found)
        return written + sum(found.nbytes for found in fetched), movement

    def _result(self, job: Job, program: Program, fetched: list[Fetched]) -> tuple[memoryview, Movement | None]:
        self._execute(program, fetched, job)
        first, movement, values = None, None, None
        if self._run.compared:
            values = self._ops.values(0).copy()
        if job.step.base is not None and self._run.measures(job):
            first = self._run.registers  # one more than any program needs
            self._load(first, fetched[job.step.base])
        out, beyond = self._ops.store(0, job.tensor.dtype, job.rounding, first)
        if first is not None:
            movement = self._ops.measure(0, first, job.tensor.dtype)
        self._check(job, fetched)
        if beyond:
            self._beyond(job, beyond)
        if values is not None:
            self._run.compare(job.tensor.name, values, read_back(out, job.tensor.dtype))
        return out, movement

    def _write(self, job: Job, out: memoryview) -> int:
        self._run.writer.write(job.tensor.name, (job.step.first + job.start) * job.tensor.dtype.bits // 8, out)
        return len(out)

    def _quantise(self, job: Quantise) -> Done:
        weights, piece = self._run.weights, job.piece
        if job.searching:
            weights.search(piece, self._rounder(job.rounding))
            return 0, None
        scale, values = weights.scale(piece.tensor), weights.rows(piece)
        raw = quantising.encode(values, piece, scale, self._rounder(job.rounding))
        if self._run.compared:
            self._run.compare(piece.tensor.name, values, quantising.decode(piece, raw, scale))
        written = quantising.write(piece, raw, scale, self._run.writer.write)
        if self._run.measures(job):
            self._measure(piece, values, raw, scale)
        return written, None

    def _rounder(self, rounding: Rounding) -> Round:
        """Rounding to FP8 as this merge does it."""

        def round_to(values: Floats, dtype: DType, factor: np.float32 | None = None) -> Octets:
            room = self._ops.room(0, values.size)
            if factor is None:
                np.copyto(room, values.reshape(-1))
            else:
                np.multiply(values.reshape(-1), factor, out=room)
            out, _ = self._ops.store(0, dtype, rounding)
            return np.frombuffer(out, np.uint8).reshape(values.shape)

        return round_to

    def _measure(self, piece: Piece, values: Floats, raw: tuple[Octets, ...], scale: np.float32) -> None:
        """Note what became of the first model's elements in every part that the piece has rows of."""
        raw = tuple(np.array(part) for part in raw)  # the next rounding goes where the last one is
        columns = piece.tensor.shape[1]
        base = np.array(values)  # where nothing was merged nothing moved
        merged = []
        for step in piece.tensor.steps:
            start = max(step.first, piece.row * columns)
            count = min(step.first + step.elements, (piece.row + piece.rows) * columns) - start
            if step.base is None or count <= 0:
                continue
            window = step.windows[step.base]
            fetched = self._reader.fetch(
                0, self._run.plan.inputs[window.input].checkpoint, window, start - step.first, count
            )
            self._load(0, fetched)
            rows = slice(start // columns - piece.row, (start + count) // columns - piece.row)
            base[rows] = self._ops.values(0).reshape(-1, columns)
            self._reader.release(fetched)
            merged.append((step.part, rows))
        for part, rows in merged:
            one = base
            if len(merged) > 1:
                one = np.array(values)
                one[rows] = base[rows]
            found = quantising.measure(piece, values, one, raw, scale, self._rounder(NEAREST))
            self._run.moved(piece.tensor.name, part, found)

    def _execute(self, program: Program, fetched: list[Fetched], job: Job) -> None:
        execute(
            program,
            self._ops,
            lambda register, model: self._load(register, fetched[model]),
            lambda call: self._apply(call, job),
        )

    def _apply(self, call: Apply, job: Job) -> None:
        """Do a method call; the job is of its whole part."""
        shape = shape_of(job.tensor, job.step)
        arguments = [
            torch.zeros(shape) if register is None else torch.from_numpy(self._ops.values(register)).view(shape)
            for register in call.arguments
        ]
        result, was_off_device = self._run.caller.apply(call, arguments, job.step.part)
        np.copyto(self._ops.room(call.register, job.count), result.reshape(-1).numpy())
        if was_off_device:
            self._run.note(self._run.outcome.off_device, job.tensor.name, job.count)

    def _load(self, register: int, found: Fetched) -> None:
        if found.is_plain:
            self._ops.load(register, found.raw[0], found.dtype)
        else:
            found.decode(self._ops.room(register, found.count))

    def _check(self, job: Job, fetched: list[Fetched]) -> None:
        if self._ops.is_finite(0):
            return
        outcome = self._run.outcome
        if self._run.non_finite == "keep" and job.phase is None:
            count, _ = self._ops.first_non_finite(0)
            self._run.note(outcome.non_finite, job.tensor.name, count)
            return
        for window, found in zip(job.step.windows, fetched, strict=True):
            self._load(0, found)
            if not self._ops.is_finite(0):
                model = self._run.plan.inputs[window.input].name
                count, first = self._ops.first_non_finite(0)
                at = window.first_element + job.start + first
                keep = "" if job.phase is not None else ", or pass --nonfinite keep"
                raise NonFiniteError(
                    f'{model}: tensor "{window.tensor}" holds NaN or infinity ({count} of the {job.count} elements '
                    f"looked at, the first at element {at}); mend the file{keep}."
                )
        raise NonFiniteError(
            f'tensor "{job.tensor.name}" overflows float32 although its inputs are finite; use smaller multipliers.'
        )

    def _beyond(self, job: Job, count: int) -> None:
        dtype, outcome = job.tensor.dtype, self._run.outcome
        if dtype.bits == 8:
            self._run.note(outcome.capped, job.tensor.name, count)
        elif self._run.non_finite == "keep":
            self._run.note(outcome.non_finite, job.tensor.name, count)
        else:
            way_out = "write bf16 with --dtype bf16" if dtype is F16 else "use smaller multipliers"
            raise NonFiniteError(
                f'tensor "{job.tensor.name}": {count} of {job.count} elements are beyond {dtype.name}\'s largest value '
                f"{dtype.largest:g}; {way_out}, or pass --nonfinite keep."
            )
