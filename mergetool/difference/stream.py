"""Read every matrix of a difference once, in order, while cores work on those before it."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from mergetool.difference.delta import Buffers
from mergetool.difference.layer import Result
from mergetool.difference.operands import Operand, OperandReader, Subject, room_for, subject
from mergetool.difference.pairs import Pair, Pairing
from mergetool.difference.whole import Whole, whole
from mergetool.engine.feeding.values import Reader, ValueReader
from mergetool.lowrank.matrices import Dense
from mergetool.ops.tensors import TORCH
from mergetool.options.differences import DiffOptions

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class DeltaStream:
    """The deltas of a ``pairing``: one thread reads them in order, ``threads`` work on one each.

    Torch's own threads are off.

    No matrix waits for the serial part of another, nothing spins, and the bytes do not depend on the number of threads.
    """

    pairing: Pairing
    threads: int
    reader: Reader = "auto"

    def solved(
        self, pairs: Sequence[Pair], options: DiffOptions, work: Callable[[Pair, Operand], T]
    ) -> Iterator[tuple[Pair, float, T | Whole | None]]:
        """Each of ``pairs`` with its energy and the result of ``work`` on its difference.

        There is no result where the difference is zero or not finite.

        What is stored whole is not worked on. With two variants the difference is what `operands.subject` says, and the energy where
        that is zero the first one's.
        """

        def solve(pair: Pair, operands: Sequence[Operand]) -> tuple[float, T | Whole | None]:
            for operand in operands:
                if isinstance(operand, Dense) and not math.isfinite(operand.energy):
                    return operand.energy, None
            found = subject(pair, operands, options)
            energy = found.energy
            if energy == 0 or not math.isfinite(energy):
                return found.energies[0] if energy == 0 else energy, None
            if pair.whole:
                return energy, whole(pair, found.delta, energy, TORCH[options.stored])
            return energy, _with_shares(work(pair, found.delta), found)

        for pair, result in self.each(pairs, solve):
            yield (pair, result, None) if isinstance(result, float) else (pair, *result)

    def each(
        self, pairs: Sequence[Pair], work: Callable[[Pair, Sequence[Operand]], U]
    ) -> Iterator[tuple[Pair, float | U]]:
        """Each of ``pairs`` with the result of ``work`` on its deltas. A pair that is only measured has its energy."""
        files = [file for model in self.pairing.inputs for file in model.checkpoint.files]
        # Positioned reads into a buffer that is reused are half again as fast here as windows, which pay for new pages.
        deltas = OperandReader(self.pairing, ValueReader(files, self.reader, buffered=True))
        free: queue.SimpleQueue[list[Buffers]] = queue.SimpleQueue()
        for _ in range(self.threads + 1):
            free.put(room_for(pairs, self.pairing.variants))
        reading = ThreadPoolExecutor(1, "delta", torch.set_num_threads, (1,))
        workers = ThreadPoolExecutor(self.threads, "decompose", torch.set_num_threads, (1,))

        def work_on(pair: Pair, operands: Sequence[Operand], buffers: list[Buffers]) -> U:
            try:
                return work(pair, operands)
            finally:
                free.put(buffers)

        def read(pair: Pair) -> float | Future[U]:
            if pair.reason and not pair.whole:
                return deltas.energy(pair)  # waits for no buffer and no worker
            buffers = free.get()
            try:
                operands = deltas.read(pair, buffers)
            except BaseException:
                free.put(buffers)
                raise
            return workers.submit(work_on, pair, operands, buffers)

        try:
            for pair, started in [(pair, reading.submit(read, pair)) for pair in pairs]:
                found = started.result()
                yield pair, found if isinstance(found, float) else found.result()
        finally:
            reading.shutdown(cancel_futures=True)
            workers.shutdown(cancel_futures=True)


def _with_shares(result: T, found: Subject) -> T:
    """A layer that says how much of each delta is common to both."""
    if found.shared is None or not isinstance(result, Result):
        return result
    first, second = (found.shared / energy if energy else 0.0 for energy in found.energies)
    return replace(result, layer=replace(result.layer, shared=(first, second)))
