"""How fast this machine can copy bytes: the ceiling of every command that reads checkpoints and writes one.

    python -m benchmarks.ceiling A.safetensors B.safetensors C.safetensors --output OUT

Reads all inputs and writes an output of the first one's size, with no arithmetic, as fast as the machine
allows: positioned reads into buffers that are reused, several threads so that reads and writes overlap, the
output's blocks reserved first, one fsync at the end. Every copy through the page cache is tried in two ways: keeping what it moved there, and letting go
of it once it is read or on its way to the disk. Which is faster depends on the machine: three files of 12.3 GB in and one out took 30.6 s and 14.4 with
24 GB of memory, since the kernel had to search for pages to reclaim; three of 3.3 GB, which fit, took 8.7 s and 3.4 in a virtual machine whose host
must give every fresh page, and may take the same elsewhere. `best_strategy` tries both, the page cache and direct I/O at several
thread counts, and keeps the fastest, so that a merge is compared with a copy that is not handicapped.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mergetool.checkpoint import system

Range = tuple[int, int]  # bytes [start, end) of a file
Job = tuple[
    Sequence[Range | None], Sequence[Range | None]
]  # what to read of each input, and what to write of the output

DROP_CACHES = Path("/proc/sys/vm/drop_caches")  # writable for root only
PROBE_BYTES = 1 << 30  # of each input; long enough that caches of a few hundred MB do not decide
_FORGOTTEN_AT_ONCE = 64 << 20
_PAGE = 4096  # direct I/O wants offsets, lengths and addresses in whole logical blocks, which are never larger


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to copy. Direct I/O goes past the page cache, and so spares the CPU one copy of every byte; ``lets_go`` keeps nothing there of the rest."""

    threads: int
    chunk: int
    direct_read: bool
    direct_write: bool
    lets_go: bool = True

    @property
    def ways(self) -> list[Strategy]:
        """The same, letting go of what it moved and keeping it, where anything is cached at all."""
        kept = [] if self.direct_read and self.direct_write else [False]
        return [replace(self, lets_go=lets_go) for lets_go in (True, *kept)]

    def __str__(self) -> str:
        """E.g. "4 threads x 8 MiB, direct reads, cached writes (kept)"."""
        cached = "cached" if self.lets_go else "cached (kept)"
        reads, writes = ("direct" if direct else cached for direct in (self.direct_read, self.direct_write))
        return f"{self.threads} threads x {self.chunk >> 20} MiB, {reads} reads, {writes} writes"


STRATEGIES = tuple(
    way
    for direct_read, direct_write in itertools.product((False, True), repeat=2)
    for threads, chunk in ((2, 1), (2, 8), (4, 8))
    for way in Strategy(threads, chunk << 20, direct_read, direct_write).ways
)


def drop_caches(paths: Iterable[Path]) -> str:
    """Empty the page cache and say how: "cold (drop_caches)" as root, else "cold (fadvise)" for these files only."""
    if os.access(DROP_CACHES, os.W_OK):
        os.sync()  # dirty pages cannot be dropped
    try:
        DROP_CACHES.write_text("3\n")
    except OSError:
        for path in _files(paths):
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)
        return "cold (fadvise)"
    return "cold (drop_caches)"


def warm_caches(paths: Iterable[Path], *, limit: int | None = None) -> str:
    """Read the files, or their first `limit` bytes, into the page cache; returns "warm", or that they do not fit."""
    buffer = memoryview(bytearray(8 << 20))
    files = _files(paths)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while (limit is None or file.tell() < limit) and file.readinto(buffer):
                pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "warm" if sum(path.stat().st_size for path in files) < 0.6 * memory else "read before, larger than RAM"


def copy(
    inputs: Sequence[Path],
    output: Path,
    strategy: Strategy,
    *,
    limit: int | None = None,
    wanted: Callable[[Path], Sequence[Range]] | None = None,
) -> float:
    """Seconds to read the inputs and write the first one's size to `output`, which is made anew and synced.

    `limit` stops after that many bytes of each input; `wanted` names the byte ranges to read of every input but
    the first, by default all. Raises OSError when the file system refuses the strategy (no direct I/O) or the
    disk is full.
    """
    sizes = [min(path.stat().st_size, limit or 1 << 62) for path in inputs]
    ranges = [[(0, size)] for size in sizes]
    if wanted is not None:
        ranges[1:] = [[(start, min(end, size)) for start, end in wanted(path) if start < size]
                      for path, size in zip(inputs[1:], sizes[1:], strict=True)]  # fmt: skip
    chunks = itertools.zip_longest(*(_chunks(each, strategy.chunk) for each in ranges))
    jobs = ((job, job[:1]) for job in chunks)  # the first input's chunk is written where it came from
    begin = time.perf_counter()
    with ExitStack() as stack:
        readers = [_open(stack, path, os.O_RDONLY, strategy.direct_read) for path in inputs]
        writer = _open(stack, output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, strategy.direct_write)
        system.allocate(writer, sizes[0])
        _run(jobs, readers, writer, strategy)
        os.ftruncate(writer, sizes[0])
        os.fsync(writer)
    return time.perf_counter() - begin


def copy_to_many(inputs: Sequence[Path], output: Path, sizes: Sequence[int], strategy: Strategy) -> float:
    """Seconds to read the inputs once and to write a file of each of ``sizes`` bytes, one after the other, each deleted once synced.

    A share of every input is read beside each output, evenly, so that reading and writing overlap. Raises as `copy` does.
    """
    seconds = 0.0
    for number, size in enumerate(sizes):
        ranges = [
            [(number * whole // len(sizes), (number + 1) * whole // len(sizes))]
            for whole in (path.stat().st_size for path in inputs)
        ]
        reads = list(itertools.zip_longest(*(_chunks(each, strategy.chunk) for each in ranges)))
        writes = list(_chunks([(0, size)], strategy.chunk))
        count = len(reads)
        jobs = ((job, writes[i * len(writes) // count : (i + 1) * len(writes) // count]) for i, job in enumerate(reads))
        try:
            begin = time.perf_counter()
            with ExitStack() as stack:
                readers = [_open(stack, path, os.O_RDONLY, strategy.direct_read) for path in inputs]
                writer = _open(stack, output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, strategy.direct_write)
                system.allocate(writer, size)
                _run(jobs, readers, writer, strategy)
                os.ftruncate(writer, size)
                os.fsync(writer)
            seconds += time.perf_counter() - begin
        finally:
            output.unlink(missing_ok=True)
    return seconds


def read(inputs: Sequence[Path], strategy: Strategy, *, limit: int | None = None) -> float:
    """Seconds to read the inputs, or the first `limit` bytes of each, once, side by side, into reused buffers."""
    sizes = [min(path.stat().st_size, limit or 1 << 62) for path in inputs]
    chunks = itertools.zip_longest(*(_chunks([(0, size)], strategy.chunk) for size in sizes))
    jobs: Iterator[Job] = ((job, ()) for job in chunks)
    begin = time.perf_counter()
    with ExitStack() as stack:
        readers = [_open(stack, path, os.O_RDONLY, strategy.direct_read) for path in inputs]
        _run(jobs, readers, None, strategy)
    return time.perf_counter() - begin


def _run(
    jobs: Iterator[Job],
    readers: list[int],
    writer: int | None,
    strategy: Strategy,
) -> None:
    """Do every job: read its chunk of each input, then write its chunks of the output."""
    lock = threading.Lock()

    def work() -> None:
        with mmap.mmap(-1, strategy.chunk) as mapping, memoryview(mapping) as buffer:
            while True:
                with lock:
                    job = next(jobs, None)
                if job is None:
                    return
                reads, writes = job
                for fd, chunk in reversed(
                    list(zip(readers, reads, strict=True))
                ):  # the first input last: it is written
                    if chunk is not None:
                        _read(fd, buffer, *chunk)
                        if strategy.lets_go and not strategy.direct_read:
                            _forget_behind(fd, *chunk)
                for chunk in writes:
                    if writer is not None and chunk is not None:
                        _write(writer, buffer, *chunk, strategy)
                        if strategy.lets_go and not strategy.direct_write:
                            _forget_behind(writer, *chunk)

    with ThreadPoolExecutor(strategy.threads) as pool:
        for worker in [pool.submit(work) for _ in range(strategy.threads)]:
            worker.result()


def _chunks(ranges: Sequence[Range], chunk: int) -> Iterator[Range]:
    """Cut byte ranges into pieces of at most `chunk`, starting on page boundaries; neighbours are joined first."""
    joined: list[list[int]] = []
    for start, end in sorted(ranges):
        start -= start % _PAGE
        if joined and start <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([start, end])
    for start, end in joined:
        for offset in range(start, end, chunk):
            yield offset, min(offset + chunk, end)


def best_strategy(inputs: Sequence[Path], output: Path, *, warm: bool = False, limit: int = PROBE_BYTES) -> Strategy:
    """The fastest way to copy the inputs, with a cold or a warm page cache.

    Tries all STRATEGIES on the first `limit` bytes of each (when warm, only those that read through the cache), then the best three again. The best of them
    then copies all, letting go and keeping: which of the two is faster may turn where the memory is full.
    """
    seconds: dict[Strategy, list[float]] = {}
    for strategy in STRATEGIES:
        if not (warm and strategy.direct_read):
            seconds[strategy] = [_probe(inputs, output, strategy, warm, limit)]
    for strategy in sorted(seconds, key=seconds.__getitem__)[:3]:
        seconds[strategy].append(_probe(inputs, output, strategy, warm, limit))
    best = min(seconds, key=lambda strategy: min(seconds[strategy]))
    return min(best.ways, key=lambda way: _probe(inputs, output, way, warm, None)) if len(best.ways) > 1 else best


def _probe(inputs: Sequence[Path], output: Path, strategy: Strategy, warm: bool, limit: int | None) -> float:
    if warm:
        warm_caches(inputs, limit=limit)
    else:
        drop_caches(inputs)
    try:
        return copy(inputs, output, strategy, limit=limit)
    except OSError:
        if strategy.direct_read or strategy.direct_write:
            return float("inf")  # some file systems refuse direct I/O; if plain I/O fails it is a real error
        raise
    finally:
        output.unlink(missing_ok=True)


def _open(stack: ExitStack, path: Path, flags: int, direct: bool) -> int:
    fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o644)
    stack.callback(os.close, fd)
    return fd


def _read(fd: int, buffer: memoryview, start: int, end: int) -> None:
    """Read bytes [start, end) of the file to the front of the buffer, in whole pages for direct I/O's sake."""
    whole = _whole_pages(end - start)
    done = 0
    while done < end - start:
        moved = os.preadv(fd, [buffer[done:whole]], start + done)
        if moved == 0:
            raise OSError(f"an input ended at byte {start + done} while it was copied; wanted {end}")
        done += moved


def _write(fd: int, buffer: memoryview, start: int, end: int, strategy: Strategy) -> None:
    """Write the front of the buffer to [start, end), whole pages when direct: the end is cut off afterwards."""
    count = _whole_pages(end - start) if strategy.direct_write else end - start
    done = 0
    while done < count:
        done += os.pwrite(fd, buffer[done:count], start + done)
    if not strategy.direct_write:
        system.start_write_back(fd, start, count)


def _forget_behind(fd: int, start: int, end: int) -> None:
    """When ``end`` is in another block than ``start``, let go of the block before that, which no other thread is still busy with."""
    block = start // _FORGOTTEN_AT_ONCE
    if end // _FORGOTTEN_AT_ONCE > block > 0:
        system.forget(fd, (block - 1) * _FORGOTTEN_AT_ONCE, _FORGOTTEN_AT_ONCE)


def _whole_pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _files(paths: Iterable[Path]) -> list[Path]:
    return [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]


def main() -> None:
    """Time every strategy whole, or only the best one with --best, and print bytes a second."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True, help="written, timed and deleted again")
    parser.add_argument("--best", action="store_true", help="find the best strategy on the first GiB, then copy all")
    parser.add_argument("--limit", type=float, metavar="GB", help="stop after this much of each input")
    options = parser.parse_args()
    limit = round(options.limit * 1e9) if options.limit else None
    sizes = [min(path.stat().st_size, limit or 1 << 62) for path in options.inputs]
    moved = sum(sizes) + sizes[0]
    chosen = [best_strategy(options.inputs, options.output)] if options.best else STRATEGIES
    for strategy in chosen:
        cache = drop_caches(options.inputs)
        try:
            seconds = copy(options.inputs, options.output, strategy, limit=limit)
        finally:
            options.output.unlink(missing_ok=True)
        print(f"{seconds:8.2f} s  {moved / 1e9 / seconds:6.2f} GB/s  {cache}  {strategy}", flush=True)


if __name__ == "__main__":
    main()
