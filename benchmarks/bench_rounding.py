"""What rounding lets through of a small delta, by merges of real files, and what measuring it costs.

    python -m benchmarks.bench_rounding                    the table of docs/explanation/rounding.md, seconds
    python -m benchmarks.bench_rounding --cost DIR         also merges DIR's alkahest, turbo and deturbo with and without

The base lies on the grid of the output's dtype, as a model does that is merged in its own dtype. The delta is Gaussian;
its root mean square is 0.1, 1 or 10 times half the spacing of the dtype at the base's element ("each"), or that times the
root mean square of all half spacings, the same for large and small weights ("even"), as training makes it.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.provenance import Result, append, commit, machine, median_ratio, size_name, torch_version
from mergetool.checkpoint import dtypes
from mergetool.checkpoint.dtypes import DType
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.reader import Checkpoint
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.engine import job, merge
from mergetool.engine.runs import Measure
from mergetool.ops.movement import Movement
from mergetool.ops.rounding import MODES, Mode
from mergetool.options.merging import MergeOptions
from tests.ops import oracle

PAGE = Path(__file__).parents[1] / "docs" / "explanation" / "rounding.md"
OUTPUTS = (dtypes.BF16, dtypes.F16, dtypes.F8_E4M3, dtypes.F8_E5M2)
SIZES = (0.1, 1.0, 10.0)
SPREADS = ("each", "even")
SHAPE = (512, 3840)
TENSOR = "layers.weight"


@dataclass(frozen=True, slots=True)
class Case:
    """One merge: how the summary describes what became of the delta, and how the oracle does."""

    output: DType
    spread: str
    size: float  # root mean square of the delta, in half spacings
    mode: Mode
    summary: Movement
    truth: Movement


def cases(folder: Path, shape: tuple[int, int] = SHAPE, outputs: Sequence[DType] = OUTPUTS) -> Iterator[Case]:
    """Merge a base and a fine-tune of it for every output dtype, delta, and rounding."""
    random = np.random.default_rng(0)
    count = shape[0] * shape[1]
    for output in outputs:
        raw = oracle.encode(0.02 * random.standard_normal(count), output)
        base = oracle.decode(raw, output).astype(np.float32)
        _write(folder / "base.safetensors", output, shape, raw)
        half = oracle.spacing(base, output) / 2
        for spread, size in product(SPREADS, SIZES):
            scale = half if spread == "each" else np.sqrt(np.mean(half**2))
            tuned = (base + size * scale * random.standard_normal(count)).astype(np.float32)
            _write(folder / "tuned.safetensors", dtypes.F32, shape, tuned.tobytes())
            for mode in MODES:
                summary, truth = _merged(folder, output, mode, base, tuned)
                yield Case(output, spread, size, mode, summary, truth)


def _merged(
    folder: Path, output: DType, mode: Mode, base: NDArray[np.float32], tuned: NDArray[np.float32]
) -> tuple[Movement, Movement]:
    out = folder / "out.safetensors"
    text = f"'{folder}/base.safetensors' + ('{folder}/tuned.safetensors' - '{folder}/base.safetensors')"
    with job.open_merge(text, MergeOptions(rounding=mode)) as plan:
        summary = job.run_merge(plan, out, overwrite=True, measure="all").movements.total
    with Checkpoint.open(out) as merged:
        stored = merged.read(TENSOR)
    return summary, oracle.measure(base + (tuned - base), base, stored, output)


def _write(path: Path, dtype: DType, shape: tuple[int, int], raw: bytes) -> None:
    with CheckpointWriter.stage(path, Header.plan([(TENSOR, dtype, shape)]), overwrite=True) as writer:
        writer.write(TENSOR, 0, memoryview(raw))
        writer.commit()


def table(found: Sequence[Case]) -> list[str]:
    """The lines of the table, one for each output dtype and delta; every figure is the oracle's."""
    head = ["output", "spread", "half units", "below half a unit", "left no trace", *(f"{mode}" for mode in MODES)]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for delta in dict.fromkeys((case.output, case.spread, case.size) for case in found):
        row = [case.truth for case in found if (case.output, case.spread, case.size) == delta]
        nearest = row[0]
        lines.append(
            [
                delta[0].name,
                delta[1],
                f"{delta[2]:g}",
                *(
                    f"{100 * share:.1f} %"
                    for share in (
                        nearest.below_half_ulp / nearest.moved,
                        nearest.eaten / nearest.moved,
                        *(truth.projection for truth in row),
                    )
                ),
            ]
        )
    return ["| " + " | ".join(line) + " |" for line in lines]


def disagreement(found: Sequence[Case]) -> float:
    """The largest difference of a share that came through, as a merge says it, from the oracle's; counts must be equal.

    Raises ValueError where a count is not.
    """
    for case in found:
        counts = [(m.moved, m.eaten, m.below_half_ulp) for m in (case.summary, case.truth)]
        if counts[0] != counts[1]:
            raise ValueError(f"{case}: counted {counts[0]}, the oracle {counts[1]}")
    return max(abs(case.summary.projection - case.truth.projection) for case in found)


def costs(folder: Path, runs: int) -> list[Result]:
    """Seconds of merges of the models in ``folder``, unmeasured and by every rounding: from a warm cache, and from the disk."""
    files = [folder / f"{name}.safetensors" for name in ("alkahest", "turbo", "deturbo")]
    text = "'{}' + 20*('{}' - '{}')".format(*files)
    ways: dict[str, tuple[Mode, Measure]] = {
        "unmeasured": ("nearest", "off"),
        **{mode: (mode, "sample") for mode in MODES},
        "nearest, --measure all": ("nearest", "all"),
    }
    results = []
    for cache in ("warm", "cold (fadvise)"):
        wall: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        for turn, (way, (mode, measure)) in product(range(runs + 1), ways.items()):
            if cache != "warm":
                _forget(files)
            began, used = time.perf_counter(), time.process_time()
            _merge(text, folder / "out.safetensors", mode, measure)
            if turn:  # the first turn warms the cache
                wall[way].append(time.perf_counter() - began)
                cpu[way].append(time.process_time() - used)
        for metric, seconds in (("seconds", wall), ("cpu_seconds", cpu)):
            for way, values in seconds.items():
                ratio = median_ratio(values, seconds["unmeasured"])
                row = Result("rounding", size_name(files[0]), way, metric, values, "s", "unmeasured", ratio, cache)
                results.append(replace(row, config={"expression": text.replace(f"{folder}/", "")}))
    (folder / "out.safetensors").unlink()
    return results


def _forget(files: Sequence[Path]) -> None:
    """Let the page cache go of whole files."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _merge(text: str, output: Path, mode: Mode, measure: Measure) -> None:
    with (
        job.open_merge(text, MergeOptions(rounding=mode), fingerprints=False) as plan,
        CheckpointWriter.stage(output, plan.header, overwrite=True) as writer,
    ):
        merge.run(plan, writer, measure=measure)
        writer.commit()


def write_page(name: str, lines: Sequence[str], page: Path = PAGE) -> None:
    """Put lines between the markers ``name`` of docs/explanation/rounding.md. Raises ValueError where it has none."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    text = page.read_text()
    if not pattern.search(text):
        raise ValueError(f"{page} has no place for the table {name}")
    page.write_text(pattern.sub(lambda found: found[1] + "\n".join([*lines, ""]) + found[2], text))
    print("\n".join(lines), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", type=Path, metavar="DIR", help="also time merges of DIR's models")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    where = f"<sub>commit {commit()} · {machine(PAGE.parent)} · torch {torch_version()}</sub>"
    with tempfile.TemporaryDirectory() as folder:
        found = list(cases(Path(folder)))
    note = f"The merges' own summaries: the same counts, shares within {disagreement(found):.0e}."
    write_page("deltas", [*table(found), "", note, "", where])
    if options.cost:
        results = costs(options.cost, options.runs)
        append(results, folder=options.cost)
        seconds = {(r.provider, r.cache, r.metric): r for r in results}
        lines = ["| merge | warm | ratio | CPU | ratio | cold | ratio |", "| --- " + "| ---: " * 6 + "|"]
        for way in dict.fromkeys(r.provider for r in results):
            cells = [f"| {way}"]
            for place in (("warm", "seconds"), ("warm", "cpu_seconds"), ("cold (fadvise)", "seconds")):
                row = seconds[(way, *place)]
                cells += [f"{float(np.median(row.values)):.2f} s", f"{row.ratio:.2f}"]
            lines.append(" | ".join(cells) + " |")
        load = f"Three {results[0].case} models, {os.cpu_count()} threads, medians of {options.runs} interleaved runs; load {os.getloadavg()[0]:.1f}"
        write_page("cost", [*lines, "", load, "", where])


if __name__ == "__main__":
    main()
