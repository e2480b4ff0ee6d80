"""Comparing two checkpoints, against reading them once and doing nothing else.

    python -m benchmarks.bench_compare --dir DIR [--size full] [--runs 3]

Takes turbo and deturbo of the family in DIR, and makes them if there are none. The read and `mergetool compare` run once a round, in
turn, the page cache emptied before each and the program read into it again, since the models are what is measured: the read is the
fastest of the strategies that `benchmarks.ceiling` knows, chosen on the files themselves, and a second one is the positioned-read
loop that compare itself has, with its threads. Memory is that of one more run. Prints medians, ratios to both and memory, and appends
them to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import ceiling, provenance
from benchmarks.contenders import console_script
from benchmarks.measure import Usage, measure
from mergetool import models
from mergetool.engine.jobs import CHUNK
from mergetool.engine.threads import default_threads

MEMBERS = ("turbo", "deturbo")
ROOT = Path(__file__).resolve().parent.parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, run the rounds, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="holds the models")
    parser.add_argument("--size", choices=("tiny", "small", "medium", "full"), default="full", help="of models to make")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    provenance.commit()
    folder: Path = options.dir.resolve()
    paths = [folder / f"{name}.safetensors" for name in MEMBERS]
    if not all(path.exists() for path in paths):
        command = [sys.executable, "-m", "benchmarks.generate", "family", folder, "--size", options.size, "--overwrite"]
        subprocess.run(command, check=True, cwd=ROOT)
    strategy = fastest(paths)
    contenders: dict[str, Callable[[], Usage]] = {
        "read": lambda: Usage(seconds=ceiling.read(paths, strategy)),
        "read, compare's loop": lambda: Usage(seconds=positioned(paths)),
        "mergetool compare": lambda: compare(paths, folder),
    }
    found: dict[str, list[Usage]] = {name: [] for name in contenders}
    work: dict[str, list[float]] = {name: [] for name in contenders}
    cache = ""
    for number in range(options.runs):
        for name, run in contenders.items():
            cache = ceiling.drop_caches(paths)
            compare(["lab.base", "lab.turbo"], folder)  # reads the program and its libraries into the page cache
            before = processor_seconds()
            found[name].append(run())
            work[name].append(processor_seconds() - before)
            said = f"{found[name][-1].seconds:.2f} s, {work[name][-1]:.1f} s of CPU"
            print(f"round {number + 1}: {name} {said}", file=sys.stderr, flush=True)
    seconds = {name: [usage.seconds for usage in usages] for name, usages in found.items()}
    ceiling.drop_caches(paths)
    sampled = compare(paths, folder, sampled=True)  # a run of its own: the sampler takes time of one of the cores
    for name in list(contenders)[:2]:
        print(f"compare / {name}: {provenance.median_ratio(seconds['mergetool compare'], seconds[name]):.2f}")
    anon = sampled.peak_anon / 1e6
    print(f"{anon:.0f} MB anonymous memory")
    size = sum(path.stat().st_size for path in paths)
    case = f"{provenance.size_name(paths[0])} pair"
    configs = {
        "read": {"read": str(strategy)},
        "read, compare's loop": {"read": f"{default_threads()} threads x 1 MiB, positioned"},
    }
    rows = [
        provenance.Result(
            "compare", case, name, "seconds", seconds[name], "s", ratio_to=reference,
            ratio=provenance.median_ratio(seconds[name], seconds[reference]), cache=cache, bytes_read=size,
            peak_anon_mb=anon if name == "mergetool compare" else None, config=configs.get(name, {}),
        )
        for name, reference in [*((each, "read") for each in contenders), ("mergetool compare", "read, compare's loop")]
    ]  # fmt: skip
    rows += [
        provenance.Result("compare", case, name, "cpu_seconds", work[name], "s", ratio_to="read", bytes_read=size,
                          ratio=provenance.median_ratio(work[name], work["read"]), cache=cache)
        for name in contenders
    ]  # fmt: skip
    print(f"load {os.getloadavg()[1]:.1f} on {default_threads()} cores")
    provenance.append(rows, folder=folder, path=options.results)


def processor_seconds() -> float:
    """What this process and those that it waited for have taken, of all threads."""
    return sum(os.times()[:4])


def fastest(paths: Sequence[Path]) -> ceiling.Strategy:
    """The strategy that reads the first gigabyte of each file in the least time, of two tries each."""
    seconds = {}
    for strategy in ceiling.STRATEGIES:
        if not strategy.direct_write:  # the same reads as with cached writes
            tries = []
            for _ in range(2):
                ceiling.drop_caches(paths)
                tries.append(ceiling.read(paths, strategy, limit=ceiling.PROBE_BYTES))
            seconds[strategy] = min(tries)
    return min(seconds, key=seconds.__getitem__)


def positioned(paths: Sequence[Path]) -> float:
    """Seconds to read the tensors of both files as compare does, chunk by chunk in turn on all its threads, and nothing else."""
    opened = [models.open_model(str(path)) for path in paths]
    try:
        files = [model.checkpoint.files[0] for model in opened]
        first = min(file.size for file in files)
        starts = iter(range(0, first, 2 * CHUNK))
        lock = threading.Lock()

        def work() -> None:
            buffer = memoryview(bytearray(2 * CHUNK))
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                for file in files:
                    size = min(2 * CHUNK, file.size - start)
                    file.read_into(buffer[:size], start)
                    file.release(start, size)

        begin = time.perf_counter()
        pool = [threading.Thread(target=work) for _ in range(default_threads())]
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        return time.perf_counter() - begin
    finally:
        for model in opened:
            model.checkpoint.close()


def compare(models: Sequence[str | Path], folder: Path, *, sampled: bool = False) -> Usage:
    """One run of the console script, with its memory where it is ``sampled``; RuntimeError with its words when it fails."""
    command: list[str | Path] = [console_script(), "compare", *models, "--json"]
    environment = {**os.environ, "MERGETOOL_CONFIG_DIR": str(folder / "no-config")}
    if sampled:
        usage = measure(command, env=environment)
    else:
        begin = time.perf_counter()
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        usage = Usage(seconds=time.perf_counter() - begin, exit_code=done.returncode, output=done.stdout)
    if usage.exit_code != 0:
        raise RuntimeError(usage.output[-2000:])
    return usage


if __name__ == "__main__":
    main()
