"""One thread of a run on the CPU: it fetches, computes, quantises and writes its jobs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mergetool.checkpoint.dtypes import F16, F32, DType
from mergetool.engine import quantisation
from mergetool.engine.bundles import Bundle, EncodeJob, Work
from mergetool.engine.feeding.values import Fetched, ValueReader
from mergetool.engine.fidelity import read_back
from mergetool.engine.jobs import Job, Quantise
from mergetool.engine.method_calls import shape_of
from mergetool.engine.quantisation import Piece
from mergetool.engine.runs import Run
from mergetool.engine.threads import TorchThreads
from mergetool.errors import NonFiniteError
from mergetool.ops.blend import Blended, blend
from mergetool.ops.contract import execute
from mergetool.ops.cpu import CpuOps
from mergetool.ops.movement import Movement
from mergetool.ops.program import Apply, Program
from mergetool.ops.rounding import NEAREST, Rounding
from mergetool.ops.stored import Stored
from mergetool.quant.encoding import Floats, Octets
from mergetool.quant.quantiser import Round
from mergetool.recipe.steps import COPY

Finished = tuple[int, Movement | None]
"""Bytes read and written by a job, and the anchor's movement in it."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """The values that a bundle's programs can load: fetched ones, then common computed ones.

    ``stored`` is all of it as `blend` takes it.
    """

    fetched: Sequence[Fetched]
    stored: Sequence[Stored | None]


class Worker:
    """One thread's registers, buffers and reading method, for all the plans of a pass."""

    def __init__(self, runs: Sequence[Run], work: Sequence[Work], torch_threads: TorchThreads) -> None:
        """Make room for any of ``work``."""
        self._runs = runs
        self._torch_threads = torch_threads
        self._registers = max((unit.operands.registers for unit in work if isinstance(unit, Bundle)), default=1)
        self._capacity = max((unit.capacity for unit in work), default=0)
        # Memory that only fp64 touches the second half of; what is ordinary is stored to it.
        self._out = np.empty(self._capacity * 8, np.uint8).data
        files = list(dict.fromkeys(file for run in runs for file in run.files))
        self._reader = ValueReader(files, runs[0].reader, buffered=any(run.decodes or run.collects for run in runs))
        self._kept: list[Floats] = []

    @cached_property
    def _ops(self) -> CpuOps:
        """The arithmetic for work that takes several passes.

        Made then: its buffers are megabytes.
        """
        # The last register is for what the result is measured against.
        return CpuOps(capacity=self._capacity, registers=self._registers + 1)

    def do(self, work: Work) -> list[Finished]:
        """Do a bundle's jobs, in their order."""
        if isinstance(work, EncodeJob):
            return [self._quantise(self._runs[work.run], work.job)]
        operands, (_, first) = work.operands, work.jobs[0]
        fetched = [
            self._reader.fetch(slot, checkpoint, window, first.start, first.count)
            for slot, (checkpoint, window) in enumerate(operands.windows)
        ]
        rooms = [self._room(place, first.count) for place in range(len(operands.common))]
        computed = [Stored(room.data.cast("B"), F32) for room in rooms]
        loaded = _Loaded(fetched, [*(elements.stored for elements in fetched), *computed])
        for room, into, shared in zip(rooms, computed, operands.common, strict=True):
            if blend(shared, loaded.stored, F32, into.raw) is None:
                with self._ops.writing(0, room):
                    self._execute(shared, loaded, self._runs[work.jobs[0][0]], first)
        done = []
        read = sum(elements.nbytes for elements in fetched)  # counted with the first
        for place, (number, job) in enumerate(work.jobs):
            program, columns = operands.programs[place], operands.columns[place]
            try:
                written, movement = self._compute(self._runs[number], job, program, columns, loaded)
            except NonFiniteError as error:
                name = self._runs[number].name
                raise NonFiniteError(f'"{name}": {error}' if name else str(error)) from None
            done.append((written + read, movement))
            read = 0
        for elements in fetched:
            self._reader.release(elements)
        return done

    def _room(self, place: int, count: int) -> Floats:
        """The buffer of a value that several programs need."""
        while place >= len(self._kept):
            self._kept.append(np.empty(0, np.float32))
        if len(self._kept[place]) < count:
            self._kept[place] = np.empty(count, np.float32)
        return self._kept[place][:count]

    def _compute(
        self, run: Run, job: Job, program: Program | None, columns: Sequence[int], loaded: _Loaded
    ) -> Finished:
        """Do one job, whose windows are ``columns`` of the loaded values; returns the bytes written."""
        fetched = [loaded.fetched[column] for column in columns]
        if program is None:
            if fetched[0].dtype.blendable and not blend(COPY, [loaded.stored[columns[0]]], F32, self._out):
                self._load(0, fetched[0])
                self._check(run, job, fetched)
            return self._write(run, job, fetched[0].raw[0]), None
        if job.phase is None:
            blended = self._blended(run, job, program, columns, loaded)
            out, movement = (
                (blended.stored, blended.movement) if blended else self._result(run, job, program, fetched, loaded)
            )
            return self._write(run, job, out), movement
        room = run.weights.room(job.tensor, job.step.first + job.start, job.count)
        if blended := blend(program, loaded.stored, F32, room.data.cast("B")):
            run.weights.note(job.tensor, blended.largest)
            return 0, None
        with self._ops.writing(0, room):
            self._execute(program, loaded, run, job)
            largest = self._ops.largest(0)
            if not math.isfinite(largest):
                self._check(run, job, fetched)
        run.weights.note(job.tensor, largest)
        return 0, None

    def _blended(self, run: Run, job: Job, program: Program, columns: Sequence[int], loaded: _Loaded) -> Blended | None:
        """The same as `_result`, in one pass, for ordinary work; else None."""
        if run.compared:
            return None
        measured = job.step.base is not None and run.measures(job)
        first = columns[job.step.base] if measured and job.step.base is not None else None
        return blend(program, loaded.stored, job.tensor.dtype, self._out, first, rounding=job.rounding)

    def _result(
        self, run: Run, job: Job, program: Program, fetched: list[Fetched], loaded: _Loaded
    ) -> tuple[memoryview, Movement | None]:
        """A program's result as stored, checked, and the movement of the anchor."""
        self._execute(program, loaded, run, job)
        first, movement, values = None, None, None
        if run.compared:
            values = self._ops.values(0).copy()
        if job.step.base is not None and run.measures(job):
            first = self._registers
            self._load(first, fetched[job.step.base])
        out, beyond = self._ops.store(0, job.tensor.dtype, job.rounding, first)
        if first is not None:
            movement = self._ops.measure(0, first, job.tensor.dtype)
        self._check(run, job, fetched)
        if beyond:
            self._beyond(run, job, beyond)
        if values is not None:
            run.compare(job.tensor.name, values, read_back(out, job.tensor.dtype))
        return out, movement

    def _write(self, run: Run, job: Job, out: memoryview) -> int:
        run.writer.write(job.tensor.name, (job.step.first + job.start) * job.tensor.dtype.bits // 8, out)
        return len(out)

    def _quantise(self, run: Run, job: Quantise) -> Finished:
        weights, piece = run.weights, job.piece
        if job.searching:
            weights.search(piece, self._rounder(job.rounding))
            return 0, None
        scale, values = weights.scale(piece.tensor), weights.rows(piece)
        raw = quantisation.encode(values, piece, scale, self._rounder(job.rounding))
        if run.compared:
            run.compare(piece.tensor.name, values, quantisation.decode(piece, raw, scale))
        written = quantisation.write(piece, raw, scale, run.writer.write)
        if run.measures(job):
            self._measure(run, piece, values, raw, scale)
        return written, None

    def _rounder(self, rounding: Rounding) -> Round:
        """Rounding to FP8 as this merge does it."""

        def round_to(values: Floats, dtype: DType, factor: np.float32 | None = None) -> Octets:
            given = Stored(np.ascontiguousarray(values).data.cast("B"), F32, 1.0 if factor is None else float(factor))
            if blended := blend(COPY, [given], dtype, self._out, rounding=rounding, saturating=True):
                return np.frombuffer(blended.stored, np.uint8).reshape(values.shape)
            room = self._ops.room(0, values.size)
            if factor is None:
                np.copyto(room, values.reshape(-1))
            else:
                np.multiply(values.reshape(-1), factor, out=room)
            out, _ = self._ops.store(0, dtype, rounding)
            return np.frombuffer(out, np.uint8).reshape(values.shape)

        return round_to

    def _measure(self, run: Run, piece: Piece, values: Floats, raw: tuple[Octets, ...], scale: np.float32) -> None:
        """Note the movement of the anchor's elements in every part that the piece has rows of."""
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
            fetched = self._reader.fetch(0, run.plan.inputs[window.input].checkpoint, window, start - step.first, count)
            rows = slice(start // columns - piece.row, (start + count) // columns - piece.row)
            self._fill(base[rows].reshape(-1), fetched)
            self._reader.release(fetched)
            merged.append((step.part, rows))
        for part, rows in merged:
            before = base
            if len(merged) > 1:
                before = np.array(values)
                before[rows] = base[rows]
            movement = quantisation.measure(piece, values, before, raw, scale, self._rounder(NEAREST))
            run.moved(piece.tensor.name, part, movement)

    def _execute(self, program: Program, loaded: _Loaded, run: Run, job: Job) -> None:
        def load(register: int, operand: int) -> None:
            if operand < len(loaded.fetched):
                self._load(register, loaded.fetched[operand])
                return
            computed = loaded.stored[operand]
            assert computed is not None
            self._ops.load(register, computed.raw, computed.dtype)

        execute(program, self._ops, load, lambda call: self._apply(call, run, job))

    def _apply(self, call: Apply, run: Run, job: Job) -> None:
        """Do a method call; the job is of its whole part."""
        import torch

        self._torch_threads.one()  # the parallelism is over parts
        shape = shape_of(job.tensor, job.step)
        arguments = [
            torch.zeros(shape) if register is None else torch.from_numpy(self._ops.values(register)).view(shape)
            for register in call.arguments
        ]
        result, was_off_device = run.caller.apply(call, arguments, job.step.part)
        np.copyto(self._ops.room(call.register, job.count), result.reshape(-1).numpy())
        if was_off_device:
            run.note(run.outcome.off_device, job.tensor.name, job.count)

    def _fill(self, out: Floats, elements: Fetched) -> None:
        """Write elements as float32 into ``out``."""
        if not elements.is_plain:
            elements.decode(out)
        elif not blend(COPY, [elements.stored], F32, out.data.cast("B")):
            self._load(0, elements)
            np.copyto(out, self._ops.values(0))

    def _load(self, register: int, elements: Fetched) -> None:
        if elements.is_plain:
            self._ops.load(register, elements.raw[0], elements.dtype)
        else:
            elements.decode(self._ops.room(register, elements.count))

    def _check(self, run: Run, job: Job, fetched: list[Fetched]) -> None:
        if self._ops.is_finite(0):
            return
        outcome = run.outcome
        if run.non_finite == "keep" and job.phase is None:
            count, _ = self._ops.first_non_finite(0)
            run.note(outcome.non_finite, job.tensor.name, count)
            return
        for window, elements in zip(job.step.windows, fetched, strict=True):
            self._load(0, elements)
            if not self._ops.is_finite(0):
                model = run.plan.inputs[window.input].name
                count, first = self._ops.first_non_finite(0)
                at = window.first_element + job.start + first
                keep = ", or use `non_finite=keep`" if run.can_keep and job.phase is None else ""
                raise NonFiniteError(
                    f'{model}: tensor "{window.tensor}" holds NaN or infinity ({count} of the {job.count} elements '
                    f"looked at, the first at element {at}); mend the file{keep}."
                )
        raise NonFiniteError(
            f'tensor "{job.tensor.name}" overflows float32 although its inputs are finite; use smaller multipliers.'
        )

    def _beyond(self, run: Run, job: Job, count: int) -> None:
        dtype, outcome = job.tensor.dtype, run.outcome
        if dtype.bits == 8:
            run.note(outcome.capped, job.tensor.name, count)
        elif run.non_finite == "keep":
            run.note(outcome.non_finite, job.tensor.name, count)
        else:
            way_out = "write bf16 with `dtype=bf16`" if dtype is F16 and run.can_keep else "use smaller multipliers"
            keep = ", or use `non_finite=keep`" if run.can_keep else ""
            raise NonFiniteError(
                f'tensor "{job.tensor.name}": {count} of {job.count} elements are beyond {dtype.name}\'s largest value '
                f"{dtype.largest:g}; {way_out}{keep}."
            )
