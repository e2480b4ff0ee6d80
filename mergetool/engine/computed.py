"""A merge that is read instead of written: its file's bytes are computed on demand.

Every byte is the one that `engine.merge` would write, since the same workers make it: of any range of plain elements just that range, of decoded rows
and of what a merge method makes whole pieces, of which the last ones are kept.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from mergetool.checkpoint.names import quoted
from mergetool.checkpoint.reader import Checkpoint
from mergetool.engine.bundles import Bundle, Operands, pieces
from mergetool.engine.device import CPU
from mergetool.engine.jobs import CHUNK, grain, job_of
from mergetool.engine.memory import memory_needed, workers
from mergetool.engine.method_calls import Caller
from mergetool.engine.quantisation import Weights
from mergetool.engine.runs import Run
from mergetool.engine.threads import TorchThreads
from mergetool.engine.worker import Worker
from mergetool.recipe.plan import Plan
from mergetool.recipe.steps import OutputTensor, Step


class ComputedCheckpoint(Checkpoint):
    """The checkpoint that ``plan`` would write, computed while it is read. Errors call it ``name``.

    It has no config.json, as a single file has none. Reading raises what merging does: NonFiniteError, and what reading the operands raises.
    """

    def __init__(self, plan: Plan, name: str) -> None:
        self._file = ComputedFile(plan, name)
        files = dict.fromkeys(file for model in plan.inputs for file in model.checkpoint.files)
        super().__init__(name, [(self._file, plan.header)], list(files), None, "safetensors")
        self.plan = plan

    @property
    def memory(self) -> int:  # type: ignore[override]
        """Bytes of memory for the computation, computed operands included."""
        return memory_needed(self.plan) + self._file.kept

    @property
    def capped(self) -> tuple[str, ...]:
        """Tensors in which values beyond an FP8 dtype's range became its largest. Only elements read so far count."""
        return self._file.capped

    def close(self) -> None:
        """Let the threads end, and close every operand. Idempotent."""
        self._file.close()
        for model in self.plan.inputs:
            model.checkpoint.close()


@dataclass(frozen=True)
class _Part:
    """A step and its bytes in the file, [begin, end), cut into pieces of ``chunk`` elements where it cannot be cut anywhere."""

    tensor: OutputTensor
    step: Step
    begin: int
    end: int
    chunk: int | None
    operands: Operands


class ComputedFile:
    """The bytes of a plan's file; see `checkpoint.inputs.Readable`."""

    def __init__(self, plan: Plan, name: str) -> None:
        self.size = plan.header.file_size
        self._plan = plan
        self._name = name
        self._parts = list(_parts(plan))
        self._begins = [part.begin for part in self._parts]
        self._threads = workers([plan])
        self._most = self._threads + 2
        self._pieces: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()
        self._computers: list[_Computer] = []
        self._own = threading.local()
        self._stack = ExitStack()
        self._torch_threads = TorchThreads()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def kept(self) -> int:
        """Bytes of the pieces that are kept, at most."""
        sizes = [part.chunk * part.tensor.dtype.itemsize for part in self._parts if part.chunk is not None]
        return self._most * max(sizes, default=0)

    @property
    def capped(self) -> tuple[str, ...]:
        """See `ComputedCheckpoint.capped`."""
        return tuple(dict.fromkeys(name for computer in self._computers for name in computer.run.outcome.capped))

    def close(self) -> None:
        """Let the threads end. Idempotent."""
        self._stack.close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Compute the bytes at ``offset`` into ``buffer``. Raises ValueError past the end, and what `ComputedCheckpoint` says."""
        view = buffer.cast("B")
        if offset < 0 or offset + len(view) > self.size:
            raise ValueError(
                f"{quoted(self._name)} has {self.size} bytes; {offset} to {offset + len(view)} are not in it"
            )
        data_start = self._plan.header.data_start
        if offset < data_start:
            header = self._plan.header.encode()[offset : offset + len(view)]
            view[: len(header)] = header
            view, offset = view[len(header) :], offset + len(header)
        target = _Target(view, offset)
        started: list[Future[Any]] = []
        kept: list[tuple[int, Future[memoryview]]] = []
        for number in range(max(0, bisect_right(self._begins, offset) - 1), len(self._parts)):
            part = self._parts[number]
            if part.begin >= offset + len(view):
                break
            for start, count in _elements(part, offset, offset + len(view)):
                if part.chunk is None:
                    started.append(self._submit(part, start, count, target))
                else:
                    at = part.begin + start * part.tensor.dtype.bits // 8
                    kept.append((at, self._piece(number, start, count)))
        # All of them, before an error of one is raised: they write into the caller's buffer.
        wait(started + [future for _, future in kept])
        for future in started:
            future.result()
        for at, piece in kept:
            target.take(at, piece.result())

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def window(self, offset: int, size: int) -> memoryview:
        """A view of a copy."""
        return memoryview(self.read(offset, size))

    def release(self, offset: int, size: int) -> None:
        """Nothing: a window is a copy, and the operands' readers let go of their own pages."""

    def will_need(self, offset: int, size: int) -> None:
        """Nothing is computed ahead."""

    def forget(self, offset: int, size: int) -> None:
        """Nothing, as `release`."""

    def _piece(self, number: int, start: int, count: int) -> Future[memoryview]:
        """A piece of a part that stays for a while, since the next request lies in it."""
        with self._lock:
            future = self._pieces.pop((number, start), None)
            if future is None:
                part = self._parts[number]
                at = part.begin + start * part.tensor.dtype.bits // 8
                room = memoryview(bytearray(count * part.tensor.dtype.bits // 8))
                future = self._submit_for(room, part, start, count, at)
            self._pieces[number, start] = future
            while len(self._pieces) > self._most:
                self._pieces.popitem(last=False)
            return future

    def _submit_for(self, room: memoryview, part: _Part, start: int, count: int, at: int) -> Future[memoryview]:
        def compute() -> memoryview:
            self._compute(part, start, count, _Target(room, at))
            return room

        return self._workers().submit(compute)

    def _submit(self, part: _Part, start: int, count: int, target: _Target) -> Future[None]:
        with self._lock:
            return self._workers().submit(self._compute, part, start, count, target)

    def _workers(self) -> ThreadPoolExecutor:
        """The threads, which begin with the first read."""
        if self._pool is None:
            self._stack.enter_context(self._torch_threads)
            self._pool = ThreadPoolExecutor(self._threads, "computed")
            self._stack.callback(self._pool.shutdown, cancel_futures=True)
        return self._pool

    def _compute(self, part: _Part, start: int, count: int, target: _Target) -> None:
        if not hasattr(self._own, "computer"):
            self._own.computer = _Computer(self._plan, self._name, self._parts, self._torch_threads)
            self._computers.append(self._own.computer)
        computer: _Computer = self._own.computer
        computer.compute(part, start, count, target)


@dataclass(frozen=True, slots=True)
class _Target:
    """Room for the file's bytes from ``offset`` on."""

    view: memoryview
    offset: int

    def take(self, at: int, data: memoryview) -> None:
        """Keep as much of ``data``, the file's bytes from ``at`` on, as there is room for."""
        begin, end = max(at, self.offset), min(at + len(data), self.offset + len(self.view))
        if begin < end:
            self.view[begin - self.offset : end - self.offset] = data[begin - at : end - at]


class _Computer:
    """One thread's worker, and the target of its bytes."""

    def __init__(self, plan: Plan, name: str, parts: list[_Part], torch_threads: TorchThreads) -> None:
        self.run = Run(plan, self, "auto", "refuse", "off", Weights([]), Caller(CPU), name=name, can_keep=False)
        if self.run.multiplies:
            torch_threads.one()
        most = [_bundle(part, plan, 0, min(part.step.elements, part.chunk or CHUNK)) for part in parts]
        self._worker = Worker([self.run], most, torch_threads)
        self._plan = plan
        self._put: Callable[[int, memoryview], None] = lambda at, data: None

    def compute(self, part: _Part, start: int, count: int, target: _Target) -> None:
        """Compute elements of a part into ``target``."""
        begin = part.begin - part.step.first * part.tensor.dtype.bits // 8
        self._put = lambda at, data: target.take(begin + at, data)
        for each in pieces(_bundle(part, self._plan, start, count)):
            self._worker.do(each)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Take the worker's bytes."""
        self._put(start, data.cast("B"))


def _bundle(part: _Part, plan: Plan, start: int, count: int) -> Bundle:
    return Bundle(((0, job_of(part.tensor, part.step, plan.options, start, count)),), part.operands)


def _parts(plan: Plan) -> Iterator[_Part]:
    """Every step with its place, in the order of the file. Only tensors that are stored as plain values can be computed in any order."""
    for tensor in sorted(plan.tensors, key=lambda tensor: plan.header.tensors[tensor.name].begin):
        assert tensor.quantiser is None
        begin = plan.header.data_start + plan.header.tensors[tensor.name].begin
        for step in tensor.steps:
            cut = grain(tensor, step, plan.options)
            first, last = (element * tensor.dtype.bits // 8 for element in (step.first, step.first + step.elements))
            operands = Operands.of([(plan, step)])
            yield _Part(tensor, step, begin + first, begin + last, None if cut.tile == 1 else cut.chunk, operands)


def _elements(part: _Part, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The elements of a part that lie in the file's bytes [begin, end), each as (start, count), in pieces as they can be computed."""
    bits, elements = part.tensor.dtype.bits, part.step.elements
    first = max(0, begin - part.begin) * 8 // bits
    last = min(elements, -(-max(0, end - part.begin) * 8 // bits))
    if part.chunk is not None:
        first = first // part.chunk * part.chunk
        last = min(elements, -(-last // part.chunk) * part.chunk)
    chunk = part.chunk or CHUNK
    for start in range(first, last, chunk):
        yield start, min(chunk, last - start)
