"""A difference on a device: upload pairs of one shape, subtract and decompose them there.

While one batch is read, others are decomposed, each on a stream of its own; only factors come back. A matrix too large for
the device's memory is decomposed on the CPU.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mergetool.difference.directions import rule_of
from mergetool.difference.layer import Result
from mergetool.difference.pairs import Pair, Pairing
from mergetool.difference.whole import Whole
from mergetool.engine import device as devices
from mergetool.engine.feeding.uploader import Arrival, Uploader
from mergetool.lowrank.balanced import balanced_batch
from mergetool.lowrank.batched import decompose_batch
from mergetool.lowrank.decomposition import Decomposition
from mergetool.lowrank.low_rank import LowRank
from mergetool.lowrank.norms import energies_of
from mergetool.lowrank.promise import ATTEMPTS, stricter
from mergetool.ops.tensors import TORCH
from mergetool.options.differences import DiffOptions

Solved = tuple[Pair, float, Result | Whole | None]
"""A pair, the energy of its difference, and its stored result: None where that energy is zero or not finite."""

WORKERS = 2
"""Batches decomposed at once: while one waits for its eigenvectors from the CPU, the device works on the other."""

READERS = 8
"""Threads that read files; each holds two page-locked buffers of 16 MB."""

MOST_ELEMENTS = 320 << 20
"""Elements of a batch: 8 matrices of 10240 x 3840. Larger ones gain nothing and leave more to do after the last byte."""

_ALIGNED = 512


def of(chosen: devices.Device) -> torch.device | None:
    """The device on which to decompose: the first GPU, None for the CPU's own path."""
    return torch.device(chosen.names[0]) if chosen.is_gpu else None


def free_memory(device: torch.device) -> int:
    """Bytes of device memory that a run takes by default: four fifths of the free ones."""
    if device.type != "cuda":
        return 4 << 30
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, from an earlier run
    return (torch.cuda.mem_get_info(device)[0] + kept) * 4 // 5


@dataclass(frozen=True, slots=True)
class Batch:
    """Pairs of one shape and their place in a buffer of raw bytes. ``places[i]`` are the starts of base and variant."""

    pairs: tuple[Pair, ...]
    places: tuple[tuple[int, int], ...]
    size: int


def in_batches(pairs: Sequence[Pair], memory: int) -> list[Batch]:
    """Sort ``pairs`` into batches by shape, each within ``memory`` bytes, or one pair.

    They come in the order in which batches fill.
    """
    waiting: dict[tuple[int, ...], list[Pair]] = {}
    batches = []
    for pair in pairs:
        same = waiting.setdefault(pair.shape, [])
        raw = (WORKERS + 1) * (pair.base.dtype.bits + pair.variant.dtype.bits) // 8
        # The difference, its BF16 copy, and as much again for what the arithmetic needs in passing.
        each = pair.base.numel * (raw + WORKERS * (4 + 2) * 5 // 4)
        same.append(pair)
        most = min(memory // each, MOST_ELEMENTS // pair.base.numel)
        if len(same) >= most:
            batches.append(_batch(waiting.pop(pair.shape)))
    return batches + [_batch(same) for same in waiting.values()]


def _batch(pairs: Sequence[Pair]) -> Batch:
    end, places = 0, []
    for pair in pairs:
        variant = _aligned(end + pair.base.nbytes)
        places.append((end, variant))
        end = _aligned(variant + pair.variant.nbytes)
    return Batch(tuple(pairs), tuple(places), end)


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED


@dataclass
class Uploads:
    """Batches on their way to a device, through ``WORKERS`` + 1 buffers there.

    Each buffer has the largest batch's size.
    """

    pairing: Pairing
    batches: Sequence[Batch]
    device: torch.device
    threads: int = READERS
    _free: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=queue.SimpleQueue)

    def run(self) -> Generator[Upload, None, None]:
        """Every batch as soon as a buffer is free for it. The taker has to `Upload.release` it."""
        size = max(batch.size for batch in self.batches)
        with Uploader(self.device, self.threads) as uploader:
            for _ in range(min(WORKERS + 1, len(self.batches))):
                self._free.put((torch.empty(size, dtype=torch.uint8, device=self.device), None))
            for batch in self.batches:
                buffer, used = self._free.get()
                uploader.start_after(used)
                arrivals = list[Arrival]()
                for pair, places in zip(batch.pairs, batch.places, strict=True):
                    sides = ((self.pairing.base, pair.base), (self.pairing.variant, pair.variant))
                    for (model, part), place in zip(sides, places, strict=True):
                        file, offset = model.checkpoint.locate(part.stored.tensor)
                        offset += part.stored.row * model.checkpoint.tensors[part.stored.tensor].row_nbytes
                        arrivals += uploader.upload(file, offset, buffer[place : place + part.nbytes])
                yield Upload(batch, buffer, arrivals, self._free)


@dataclass
class Upload:
    """One batch under way into ``buffer``."""

    batch: Batch
    buffer: Tensor
    arrivals: list[Arrival]
    free: queue.SimpleQueue[tuple[Tensor, torch.cuda.Event | None]]

    def wait(self, stream: torch.cuda.Stream | None) -> None:
        """Return when everything is read; ``stream`` then sees it on the device. Raises what the reading raised."""
        Uploader.finish(self.arrivals, stream)

    def values(self, index: int) -> tuple[Tensor, Tensor]:
        """Base and variant of pair ``index`` as stored, [m, n] on the device."""
        pair, (base, variant) = self.batch.pairs[index], self.batch.places[index]
        sides = ((pair.base, base), (pair.variant, variant))
        first, second = (
            self.buffer[start : start + part.nbytes].view(TORCH[part.dtype]).view(pair.shape) for part, start in sides
        )
        return first, second

    def release(self, stream: torch.cuda.Stream | None) -> None:
        """Give the buffer back. It is overwritten only after ``stream`` has done its work so far."""
        event = None
        if stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        self.free.put((self.buffer, event))


class Solver:
    """Turns uploads into results. ``alone`` handles a pair that the device has no memory for."""

    def __init__(self, pairing: Pairing, options: DiffOptions, alone: Callable[[Pair], Solved]) -> None:
        self._options = options
        self._family = pairing.base.anatomy.family
        self._alone = alone
        self._stream = threading.local()

    def solve(self, upload: Upload) -> list[Solved]:
        """Every pair of ``upload``, in order; the buffer is released in any case."""
        stream = self._own_stream(upload.buffer.device)
        context: AbstractContextManager[object] = nullcontext() if stream is None else torch.cuda.stream(stream)
        with context:
            try:
                upload.wait(stream)
                return self._shrinking(upload, 0, len(upload.batch.pairs))
            finally:
                upload.release(stream)

    def _own_stream(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type != "cuda":
            return None
        if not hasattr(self._stream, "stream"):
            self._stream.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream: torch.cuda.Stream = self._stream.stream
        return stream

    def _shrinking(self, upload: Upload, start: int, end: int) -> list[Solved]:
        """Pairs ``start`` to ``end`` at once, or where memory runs out half of them at a time, or on the CPU."""
        try:
            return self._at_once(upload, start, end)
        except torch.OutOfMemoryError:
            pass  # and go on outside, where nothing holds the tensors of the attempt
        torch.cuda.empty_cache()
        if end - start == 1:
            return [self._alone(upload.batch.pairs[start])]
        middle = (start + end) // 2
        return self._shrinking(upload, start, middle) + self._shrinking(upload, middle, end)

    def _at_once(self, upload: Upload, start: int, end: int) -> list[Solved]:
        pairs, options = upload.batch.pairs[start:end], self._options
        deltas = torch.empty(len(pairs), *pairs[0].shape, device=upload.buffer.device)
        for i, delta in enumerate(deltas):
            subtract(*upload.values(start + i), out=delta)
        energies = energies_of(deltas)
        usable = [i for i, energy in enumerate(energies) if math.isfinite(energy) and energy > 0]
        found = decompose_batch(
            deltas if len(usable) == len(pairs) else deltas[usable],
            [pairs[i].name for i in usable],
            rank=options.rank,
            rule=rule_of(options),
            rank_max=options.cap,
            seed=options.seed,
            energies=[energies[i] for i in usable],
        )
        results: dict[int, Result] = {}
        for i, one, (stored, residual) in zip(usable, found, balanced_batch(found, TORCH[options.stored]), strict=True):
            kept = self._meeting_the_share(one, stored, residual, deltas[i], energies[i])
            results[i] = Result.of(pairs[i], *kept, self._family, options.share)
        return [(pair, energy, results.get(i)) for i, (pair, energy) in enumerate(zip(pairs, energies, strict=True))]

    def _meeting_the_share(
        self, found: Decomposition, stored: LowRank, residual: float, delta: Tensor, energy: float
    ) -> tuple[Decomposition, LowRank, float]:
        """The same, or with a larger rank where rounding took the stored pair below the threshold."""
        options = self._options
        for _ in range(ATTEMPTS - 1):
            rule = stricter(options.share, found, residual)
            if rule is None:
                break
            (found,) = decompose_batch(
                delta[None], [found.name], rule=rule, rank_max=options.cap, seed=options.seed, energies=[energy]
            )
            ((stored, residual),) = balanced_batch([found], TORCH[options.stored])
        return found, stored, residual


def subtract(base: Tensor, variant: Tensor, *, out: Tensor) -> None:
    """``out`` = variant - base, one float32 subtraction of exactly widened values. Float64 values are rounded first."""
    out.copy_(variant)
    # Promotion widens these by itself, without a copy; FP8 it refuses, and float64 it would not round.
    direct = base.dtype in (torch.bfloat16, torch.float16, torch.float32)
    out.sub_(base if direct else base.float())


def solve_all(
    pairing: Pairing,
    options: DiffOptions,
    device: torch.device,
    memory: int,
    alone: Callable[[Pair], Solved],
) -> Iterator[Solved]:
    """Decompose every plain matrix, batch by batch, in about ``memory`` bytes of the device.

    Raises what reading and decomposing raise.
    """
    # torch loads its linear algebra at the first call, and fails if two threads make that call.
    torch.linalg.cholesky_ex(torch.eye(2, device=device))
    solver = Solver(pairing, options, alone)
    uploads = Uploads(pairing, in_batches([pair for pair in pairing.decomposed if pair.is_plain], memory), device)
    working: deque[Future[list[Solved]]] = deque()
    workers = ThreadPoolExecutor(WORKERS, "solve")
    try:
        with closing(uploads.run()) as running:
            for upload in running:
                working.append(workers.submit(solver.solve, upload))
                while working and working[0].done():
                    yield from working.popleft().result()
        while working:
            yield from working.popleft().result()
    finally:
        workers.shutdown(cancel_futures=True)
