"""One pass over a comparison's models: chunks on several threads, each element read once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mergetool.checkpoint.dtypes import F32
from mergetool.checkpoint.names import quoted
from mergetool.comparison.energies import Energies
from mergetool.engine.feeding.read_ahead import give_way
from mergetool.engine.feeding.values import Fetched, Reader, ValueReader
from mergetool.engine.jobs import Job
from mergetool.engine.threads import asked
from mergetool.errors import NonFiniteError
from mergetool.ops.blend import blend
from mergetool.ops.contract import execute
from mergetool.ops.cpu import CpuOps
from mergetool.ops.movement import Movement
from mergetool.ops.stored import Stored
from mergetool.ops.sums import is_read, side_by_side
from mergetool.quant.encoding import Floats
from mergetool.recipe.steps import Input, Window, window_of


@dataclass(frozen=True, slots=True)
class ComparedModels:
    """The opened models, and the places of those that are compared.

    delta = variant - base, to be added to ``onto``; the reference delta is (its variant, its base). Each model is opened once.
    """

    inputs: tuple[Input, ...]
    base: int
    variant: int
    onto: int
    reference: tuple[int, int] | None = None

    @property
    def columns(self) -> tuple[int, ...]:
        """The models that are read, each once."""
        return tuple(dict.fromkeys((self.base, self.variant, self.onto, *(self.reference or ()))))

    def window(self, column: int, part: str) -> Window:
        """The place where one of the models stores a part."""
        return window_of(column, self.inputs[column], self.inputs[column].anatomy.parts[part])


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements ``[start, start + count)`` of a part. With a ``merge`` they are also merged as that job says, and what came through is
    measured; without ``sums`` nothing else is."""

    part: str
    start: int
    count: int
    merge: Job | None = None
    sums: bool = True


Measured = tuple[Energies | None, Movement | None]
TASK = 4
"""Chunks that a thread takes at a time. Each hand-over wakes the thread that waits for it, which takes the lock from those that work."""


def stream(
    operands: ComparedModels,
    chunks: Sequence[Chunk],
    *,
    registers: int = 0,
    threads: int | None = None,
    reader: Reader = "auto",
    progress: Callable[[int], None] = lambda _: None,
) -> list[Measured]:
    """Measure every chunk, in the order given, which is the order of reading.

    ``registers`` are those that the merges' programs need. ``progress`` is told of bytes read, from this thread. Raises NonFiniteError,
    naming model and tensor, for NaN or infinity, and what reading raises.
    """
    local = threading.local()
    capacity = max((chunk.count for chunk in chunks), default=0)

    def measure(some: Sequence[Chunk]) -> list[tuple[Measured, int]]:
        if not hasattr(local, "meter"):
            local.meter = _Meter(operands, capacity, registers, reader)
        meter: _Meter = local.meter
        return [meter.measure(chunk) for chunk in some]

    measured = []
    with ThreadPoolExecutor(asked(threads), "compare", give_way) as pool:
        waiting = [pool.submit(measure, chunks[at : at + TASK]) for at in range(0, len(chunks), TASK)]
        try:
            for future in waiting:
                for measurement, read in future.result():
                    measured.append(measurement)
                    progress(read)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return measured


class _Meter:
    """One thread's registers and way of reading. Its registers: those of the merge's program, the merge's first model, and one for each model
    whose elements cannot be summed as they are stored."""

    def __init__(self, operands: ComparedModels, capacity: int, registers: int, reader: Reader) -> None:
        self._operands = operands
        self._capacity = capacity
        self._first = registers
        self._register = {column: registers + 1 + i for i, column in enumerate(operands.columns)}
        self._out = memoryview(bytearray(4 * capacity))
        inputs = [operands.inputs[column] for column in operands.columns]
        files = [file for model in inputs for file in model.checkpoint.files]
        # Into buffers: a mapping's fresh pages took 6 ns a pair of elements, which is more than all that is done with them.
        self._reader = ValueReader(files, reader, buffered=True)

    @cached_property
    def _ops(self) -> CpuOps:
        """The arithmetic for elements that must be converted first.

        Made then: its buffers are megabytes.
        """
        return CpuOps(capacity=self._capacity, registers=self._first + 1 + len(self._register))

    def measure(self, chunk: Chunk) -> tuple[Measured, int]:
        """Measure a chunk, and count the bytes read for it."""
        merge = chunk.merge
        merged = [window.input for window in merge.step.windows] if merge else []
        fetched = {
            column: self._reader.fetch(
                column,
                self._operands.inputs[column].checkpoint,
                self._operands.window(column, chunk.part),
                chunk.start,
                chunk.count,
            )
            for column in (self._operands.columns if chunk.sums else dict.fromkeys(merged))
        }
        energies = self._energies(chunk, fetched) if chunk.sums else None
        movement = self._movement(merge, [fetched[column] for column in merged]) if merge else None
        read = sum(elements.nbytes for elements in fetched.values())
        for elements in fetched.values():
            self._reader.release(elements)
        return (energies, movement), read

    def _energies(self, chunk: Chunk, fetched: Mapping[int, Fetched]) -> Energies:
        operands = self._operands
        stored = {column: self._stored(self._register[column], elements) for column, elements in fetched.items()}
        onto = None if operands.onto in (operands.base, operands.variant) else operands.onto
        asked = (operands.base, operands.variant, onto, *(operands.reference or (None, None)))
        sums = side_by_side([None if column is None else stored[column] for column in asked], chunk.count)
        if not math.isfinite(sum(sums)):
            raise self._not_finite(chunk, fetched)
        base, variant, delta, other, reference, shared = sums
        of_onto = {operands.base: base, operands.variant: variant}.get(operands.onto, other)
        return Energies(chunk.count, base, variant, delta, of_onto, reference, shared)

    def _stored(self, register: int, elements: Fetched) -> Stored:
        """Elements as they can be summed: as they are stored, or else in a register."""
        stored = elements.stored
        if stored is not None and is_read(stored):
            return stored
        return Stored(self._values(register, elements).data.cast("B"), F32)

    def _movement(self, job: Job, fetched: Sequence[Fetched]) -> Movement:
        """The movement of the anchor's elements in the merge: the steps of the engine's worker, without the writing."""
        assert job.step.program is not None
        assert job.step.base is not None
        stored = [elements.stored for elements in fetched]
        blended = blend(job.step.program, stored, job.tensor.dtype, self._out, job.step.base)
        if blended and blended.movement:
            return blended.movement
        execute(job.step.program, self._ops, lambda register, model: self._load(register, fetched[model]))
        self._load(self._first, fetched[job.step.base])
        self._ops.store(0, job.tensor.dtype, job.rounding, self._first)
        return self._ops.measure(0, self._first, job.tensor.dtype)

    def _values(self, register: int, elements: Fetched) -> Floats:
        self._load(register, elements)
        return self._ops.values(register)

    def _load(self, register: int, elements: Fetched) -> None:
        if elements.is_plain:
            self._ops.load(register, elements.raw[0], elements.dtype)
        else:
            elements.decode(self._ops.room(register, elements.count))

    def _not_finite(self, chunk: Chunk, fetched: Mapping[int, Fetched]) -> NonFiniteError:
        for column, elements in fetched.items():
            bad = ~np.isfinite(self._values(self._register[column], elements))
            if bad.any():
                window = self._operands.window(column, chunk.part)
                at = window.first_element + chunk.start + int(bad.argmax())
                return NonFiniteError(
                    f"{self._operands.inputs[column].name}: tensor {quoted(window.tensor)} holds NaN or infinity ({int(bad.sum())} of the "
                    f"{chunk.count} elements looked at, the first at element {at}); mend the file, or leave it out with `exclude`."
                )
        return NonFiniteError(
            f"the difference of parameter {quoted(chunk.part)} overflows float32; leave it out with `exclude`."
        )
