"""Every matrix of a difference read once, in order, while those before it are worked on, one a core."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import torch

from mergetool.checkpoint.inputs import InputFile
from mergetool.difference.delta import Buffers
from mergetool.difference.layer import Result
from mergetool.difference.operands import Operand, OperandReader, Subject, room_for, subject
from mergetool.difference.pairs import Pair, Pairing
from mergetool.difference.whole import Whole, whole
from mergetool.engine.feeding.values import Reader, ValueReader
from mergetool.lowrank.matrices import Dense
from mergetool.ops.cpu import TORCH
from mergetool.options.differences import DiffOptions

T = TypeVar("T")
U = TypeVar("U")


def stream(
    pairing: Pairing,
    options: DiffOptions,
    pairs: Sequence[Pair],
    work: Callable[[Pair, Operand], T],
    *,
    files: Sequence[InputFile],
    reader: Reader,
    threads: int,
) -> Iterator[tuple[Pair, float, T | Whole | None]]:
    """Every one of ``pairs`` in order with its energy, and what ``work`` makes of its difference, unless that is zero or not finite.

    What is stored whole is not worked on. With two variants the difference is what `operands.subject` says, and the energy where
    that is zero the first one's. One thread reads, ``threads`` work on a matrix each, with torch's own threads off: no matrix waits
    for the serial part of another, nothing spins, and the bytes do not depend on the number of threads.
    """
    for pair, found in each(
        pairing,
        pairs,
        lambda pair, operands: _worked(pair, operands, options, work),
        files=files,
        reader=reader,
        threads=threads,
    ):
        energy, result = (found, None) if isinstance(found, float) else found
        yield pair, energy, result


def each(
    pairing: Pairing,
    pairs: Sequence[Pair],
    work: Callable[[Pair, Sequence[Operand]], U],
    *,
    files: Sequence[InputFile],
    reader: Reader,
    threads: int,
) -> Iterator[tuple[Pair, float | U]]:
    """Every one of ``pairs`` in order with what ``work`` makes of its variants' deltas; of a pair that is only measured its energy.

    Threads are as `stream` says.
    """
    # Positioned reads into a buffer that is reused are half again as fast here as windows, which pay for new pages.
    deltas = OperandReader(pairing, ValueReader(files, reader, buffered=True))
    free: queue.SimpleQueue[list[Buffers]] = queue.SimpleQueue()
    for _ in range(threads + 1):
        free.put(room_for(pairs, pairing.variants))
    reading = ThreadPoolExecutor(1, "delta", torch.set_num_threads, (1,))
    workers = ThreadPoolExecutor(threads, "decompose", torch.set_num_threads, (1,))

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


def _worked(
    pair: Pair, operands: Sequence[Operand], options: DiffOptions, work: Callable[[Pair, Operand], T]
) -> tuple[float, T | Whole | None]:
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


def _with_shares(result: T, found: Subject) -> T:
    """A layer that says how much of each delta is common to both."""
    if found.shared is None or not isinstance(result, Result):
        return result
    first, second = (found.shared / energy if energy else 0.0 for energy in found.energies)
    return replace(result, layer=replace(result.layer, shared=(first, second)))
