"""Extraction against its limit: a whole pair of models against reading both files once, on this machine.

    python -m benchmarks.bench_diff --dir DIR [--runs 3] [--size full] [--layers]

Each round, with a cold page cache: both files are read once, side by side, as fast as the machine allows; then
`mergetool diff` runs on them as a user runs it, Python's start and the writing of the LoRA included. With --layers the
table of single layers against torch's SVD routines is made too (see benchmarks.bench_diff_layer).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ceiling, provenance
from benchmarks.contenders import console_script
from benchmarks.measure import Usage, measure

ROOT = Path(__file__).parents[1]
STRATEGIES = tuple(
    ceiling.Strategy(threads, chunk << 20, direct, False)
    for threads, chunk, direct in (
        (1, 1, False),
        (2, 1, False),
        (2, 8, False),
        (4, 8, False),
        (2, 8, True),
        (4, 4, True),
    )
)
CASES = {"thresh 0.995, cap 64": ["--rank-thresh", "0.995"]}


def best_reading(paths: Sequence[Path]) -> ceiling.Strategy:
    """The fastest way to read the first 2 GiB of each file, cold."""
    seconds: dict[ceiling.Strategy, float] = {}
    for strategy in STRATEGIES:
        ceiling.drop_caches(paths)
        seconds[strategy] = ceiling.read(paths, strategy, limit=2 << 30)
    return min(seconds, key=lambda strategy: seconds[strategy])


def extraction(base: Path, variant: Path, output: Path, options: Sequence[str]) -> tuple[Usage, dict[str, object]]:
    """One run of `mergetool diff`; its JSON summary is returned too. Raises RuntimeError when it fails."""
    models: list[str | Path] = ["--base", base, "--variant", variant, "-o", output]
    usage = measure([console_script(), "diff", *models, "--json", *options])
    if usage.exit_code:
        raise RuntimeError(usage.output)
    return usage, json.loads(usage.output)


def whole_pair(folder: Path, runs: int) -> list[provenance.Result]:
    """Rounds of reading and extraction, cold; prints a line each."""
    base, variant = paths = (folder / "alkahest.safetensors", folder / "turbo.safetensors")
    strategy = best_reading(paths)
    size, cache = provenance.size_name(base), ""
    reading: list[float] = []
    usages: dict[str, list[Usage]] = {case: [] for case in CASES}
    for number in range(runs):
        cache = ceiling.drop_caches(paths)
        reading.append(ceiling.read(paths, strategy))
        print(f"round {number + 1}: reading both once {reading[-1]:.1f} s ({strategy})", flush=True)
        for case, options in CASES.items():
            ceiling.drop_caches(paths)
            with tempfile.TemporaryDirectory(prefix="bench-diff-", dir=folder) as scratch:
                usage, found = extraction(base, variant, Path(scratch) / "lora.safetensors", options)
            usages[case].append(usage)
            share = usage.seconds / reading[-1]
            print(f"  {case}: {usage.seconds:.1f} s, {share:.2f} x reading, {_summary(found)}", flush=True)
    config = {"reading": str(strategy)}
    total = sum(path.stat().st_size for path in paths)
    rows = [
        provenance.Result(
            "diff", f"{size} pair", "read once", "seconds", reading, "s", cache=cache, bytes_read=total, config=config
        )
    ]
    for case, measured in usages.items():
        seconds = [usage.seconds for usage in measured]
        rows.append(
            provenance.Result(
                "diff",
                f"{size} pair, {case}",
                "mergetool",
                "seconds",
                seconds,
                "s",
                ratio_to="read once",
                ratio=provenance.median_ratio(seconds, reading),
                cache=cache,
                bytes_read=total,
                peak_anon_mb=max(usage.peak_anon for usage in measured) / 1e6,
                peak_rss_mb=max(usage.peak_rss for usage in measured) / 1e6,
                config=config,
            )
        )
    return rows


def _summary(found: dict[str, object]) -> str:
    layers = found["layers"]
    assert isinstance(layers, list)
    ranks = sorted(layer["rank"] for layer in layers)
    return f"{len(layers)} matrices, ranks {ranks[0]} to {ranks[-1]}"


def single_layers(sizes: Sequence[tuple[int, int]]) -> list[provenance.Result]:
    """Every provider of `bench_diff_layer` against the thin SVD of the same matrix; errors are in `config`."""
    from benchmarks.bench_diff_layer import layer_rows

    rows = [row for m, n in sizes for row in layer_rows(m, n, [0.95])]
    reference = {row["case"]: row["seconds"] for row in rows if row["provider"] == "torch.linalg.svd"}
    return [
        provenance.Result(
            "diff layer",
            row["case"],
            row["provider"],
            "seconds",
            [row["seconds"]],
            "s",
            ratio_to="torch.linalg.svd",
            ratio=row["seconds"] / reference[row["case"]],
            cache="in memory",
            config={name: row[name] for name in ("energy", "optimal_energy", "rank", "exact_rank")},
        )
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the models if they are missing, run, print, and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="holds the models; outputs come and go here too")
    parser.add_argument("--size", default="full", help="of the models to make where there are none")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--layers", action="store_true", help="also the table of single layers")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    if not (options.dir / "turbo.safetensors").exists():
        command = [sys.executable, "-m", "benchmarks.generate", "family", options.dir.resolve(), "--size", options.size]
        subprocess.run(command, check=True, cwd=ROOT)
    rows = whole_pair(options.dir, options.runs)
    if options.layers:
        rows += single_layers([(10240, 3840), (3840, 3840)])
    for row in rows:
        ratio = "" if row.ratio is None else f"  {row.ratio:.2f} x {row.ratio_to}"
        cells = row.row()
        print(f"{row.case:44}{row.provider:28}{cells['p50']:10.3f} {row.unit}{ratio}")
    provenance.append(rows, folder=options.dir, path=options.results)


if __name__ == "__main__":
    main()
