"""What do four merges cost in one pass, against a plain copy of the same bytes?

    python -m benchmarks.bench_sweep --dir DIR --size full --runs 3

Computes alkahest + m * (turbo - deturbo) for m = 5, 10, 20 and 40 in one pass, on models that `benchmarks.generate` made (and makes
them if DIR has none). The outputs are plain FP8, half the size of the inputs, so that three inputs of 12.3 GB and four
outputs fit on a disk with 62 GB; --dtype bf16 needs 86. The copy reads every byte of the inputs and writes four files of the outputs'
size, one after the other, each synced and deleted before the next. Both run once a round, in turn, the page cache emptied before each.
With --singles the four merges are also run one by one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ceiling, provenance
from benchmarks.contenders import PROTECTED, Models
from benchmarks.generate import SIZES
from benchmarks.measure import Usage, measure

MULTIPLIERS = (5, 10, 20, 40)
ROOT = Path(__file__).resolve().parent.parent
SWEEP = """
import sys
from pathlib import Path
from mergetool.checkpoint import dtypes
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
out, dtype, protected, *expressions = sys.argv[1:]
options = MergeOptions(protect=(protected,), dtype=dtypes.output_dtype(dtype))
with job.open_merges([(text, options) for text in expressions]) as plans:
    job.run_merges(plans, [Path(out, f"{i}.safetensors") for i in range(len(plans))])
"""
"""A process of its own, as the merges of the other benchmarks have."""


def expressions(models: Models) -> list[str]:
    """One for every multiplier."""
    a, b, c = (f"'{path}'" for path in models.paths)
    return [f"{a} + {m} * ({b} - {c})" for m in MULTIPLIERS]


def merge(texts: Sequence[str], dtype: str, folder: Path) -> tuple[Usage, list[int]]:
    """Merge all of ``texts`` in one pass; also the sizes of the outputs, which are deleted.

    Raises RuntimeError with what a failed run says.
    """
    try:
        usage = measure([sys.executable, "-c", SWEEP, folder, dtype, PROTECTED, *texts])
        if usage.exit_code:
            raise RuntimeError(usage.output)
        return usage, [path.stat().st_size for path in sorted(folder.glob("*.safetensors"))]
    finally:
        for path in folder.glob("*.safetensors"):
            path.unlink()


def results(
    swept: Sequence[Usage],
    copied: Sequence[float],
    singles: Sequence[float],
    sizes: Sequence[int],
    case: str,
    **how: str,
) -> list[provenance.Result]:
    """Rows: the copy, the sweep and, where they were run, the single merges, each against the copy of its round."""
    rows: list[tuple[str, list[float], Usage]] = [
        ("byte copy", list(copied), Usage()),
        ("mergetool", [usage.seconds for usage in swept], max(swept, key=lambda usage: usage.peak_anon)),
    ]
    if singles:
        rows.append(("mergetool, one by one", list(singles), Usage()))
    return [
        provenance.Result(
            benchmark="sweep",
            case=case,
            provider=provider,
            metric="seconds",
            values=values,
            unit="s",
            ratio_to="byte copy",
            ratio=provenance.median_ratio(values, copied),
            cache=how["cache"],
            bytes_read=usage.read_bytes or None,
            bytes_written=sum(sizes),
            peak_anon_mb=usage.peak_anon / 1e6 or None,
            config={"multipliers": list(MULTIPLIERS), "copy": how["copy"]},
        )
        for provider, values, usage in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the models if they are missing, run the rounds, print medians and ratios, append the rows."""
    options = _parser().parse_args(arguments)
    provenance.commit()
    models = Models.in_folder(options.dir)
    if not all(path.exists() for path in models.paths):
        command = [sys.executable, "-m", "benchmarks.generate", "family", options.dir.resolve(), "--size", options.size]
        subprocess.run([*command, "--overwrite"], check=True, cwd=ROOT)
    texts, sizes, cache = expressions(models), list[int](), ""
    swept: list[Usage] = []
    copied: list[float] = []
    singles: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-sweep-", dir=options.dir) as scratch:
        folder = Path(scratch)
        strategy = ceiling.best_strategy(models.paths, folder / "probe.bin")
        for _ in range(options.runs):
            cache = ceiling.drop_caches(models.paths)
            usage, sizes = merge(texts, options.dtype, folder)
            swept.append(usage)
            cache = ceiling.drop_caches(models.paths)
            copied.append(ceiling.copy_to_many(models.paths, folder / "copy.bin", sizes, strategy))
            print(f"sweep {swept[-1].seconds:.1f} s, copy {copied[-1]:.1f} s", file=sys.stderr, flush=True)
            if options.singles:
                ceiling.drop_caches(models.paths)
                singles.append(sum(merge([text], options.dtype, folder)[0].seconds for text in texts))
    case = f"{provenance.size_name(models.paths[0])}, {len(texts)} outputs in {options.dtype}"
    rows = results(swept, copied, singles, sizes, case, cache=cache, copy=str(strategy))
    for row in rows:
        low, middle, high = (provenance.percentile(row.values, share) for share in (0.2, 0.5, 0.8))
        print(f"{row.provider:24}{middle:8.1f} s  ({low:.1f}-{high:.1f})  {row.ratio:.2f} x the copy")
    print(f"peak memory of its own {max(usage.peak_anon for usage in swept) / 1e6:.0f} MB")
    provenance.append(rows, folder=options.dir, path=options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_sweep", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dir", type=Path, required=True, help="holds the models; outputs come and go here too")
    parser.add_argument("--size", choices=SIZES, default="small", help="of models to make")
    parser.add_argument("--dtype", default="fp8_e4m3", help="of the outputs")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--singles", action="store_true", help="also the four merges one by one")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    return parser


if __name__ == "__main__":
    main()
