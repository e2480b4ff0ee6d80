"""How fast is a merge of three checkpoints, against a plain byte copy and against other tools?

    python -m benchmarks.bench_merge --dir DIR --size full --runs 3 --peers-python VENV/bin/python
    python -m benchmarks.bench_merge --dir FP8 --size full --runs 3 --quant fp8-scaled

Computes alkahest + 20 * (turbo - deturbo) on models that `benchmarks.generate` made (and makes them if DIR has
none). Every contender runs once a round, in turn, the page cache emptied before each, the output deleted after it:
what the machine does between rounds hits all alike. Prints medians, ratios to the byte copy and to the peers,
and appends them to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import ceiling, contenders, provenance
from benchmarks.contenders import ByteCopy, Contender, Mergetool, Models
from benchmarks.generate import SIZES
from benchmarks.measure import Usage

EXPRESSION = f"alkahest + {contenders.ALPHA} * (turbo - deturbo)"
COPY = ("byte copy", "")
ROOT = Path(__file__).resolve().parent.parent
VARIANTS = (
    *(("--threads", str(threads)) for threads in (1, 2, 4)),
    ("--reader", "mmap"),
    ("--reader", "pread"),
)


@dataclass
class Series:
    """All runs of one contender under one cache state, in the order of the rounds."""

    contender: Contender
    warm: bool
    cache: str = ""
    usages: list[Usage] = field(default_factory=list)
    synced: list[float] = field(default_factory=list)
    written: int = 0
    agreement: str = ""

    @property
    def seconds(self) -> list[float]:
        """Wall seconds of the command, one a round."""
        return [usage.seconds for usage in self.usages]

    @property
    def label(self) -> str:
        """Provider and setting, as the table shows them."""
        warm = "warm cache" if self.warm else ""
        return ", ".join(filter(None, (self.contender.provider, self.contender.setting, warm)))

    @property
    def peak_anon_mb(self) -> float:
        """The largest peak of all rounds, in decimal megabytes."""
        return max(usage.peak_anon for usage in self.usages) / 1e6

    @property
    def peak_rss_mb(self) -> float:
        """The largest peak of all rounds, in decimal megabytes."""
        return max(usage.peak_rss for usage in self.usages) / 1e6


METRICS: Mapping[str, Callable[[Series], list[float]]] = {
    "seconds": lambda one: one.seconds,
    "seconds_synced": lambda one: one.synced,
}


def line_up(cold: ceiling.Strategy, peers: Sequence[Contender]) -> list[Series]:
    """Who runs in a round, in order: the copy, mergetool, the peers."""
    ours: list[Contender] = [ByteCopy(cold), Mergetool()]
    return [Series(one, warm=False) for one in [*ours, *peers]]


def variants(cold: ceiling.Strategy, warm: ceiling.Strategy) -> list[Series]:
    """Who else runs with --variants: the copy of needed bytes only, mergetool's options, and a warm cache."""
    return [
        Series(ByteCopy(cold, needed_only=True), warm=False),
        *(Series(Mergetool(options), warm=False) for options in VARIANTS),
        Series(ByteCopy(warm), warm=True),
        Series(Mergetool(), warm=True),
    ]


def run_round(series: Sequence[Series], models: Models, folder: Path, *, check: bool) -> None:
    """One run of every contender in turn, its output deleted before the next begins."""
    for one in series:
        out = folder / "out"
        one.cache = (ceiling.warm_caches if one.warm else ceiling.drop_caches)(models.paths)
        try:
            usage, synced = contenders.run_synced(one.contender, models, out)
            one.usages.append(usage)
            one.synced.append(synced)
            files = contenders.output_files(out)
            one.written = sum(path.stat().st_size for path in files)
            if check and not one.agreement and not isinstance(one.contender, ByteCopy):
                one.agreement = _agreement(one.contender, files, models)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        print(f"  {one.label:36} {usage.seconds:8.2f} s {one.agreement}", file=sys.stderr, flush=True)


def _agreement(contender: Contender, files: Sequence[Path], models: Models) -> str:
    from benchmarks.agreement import compare

    protected = contenders.PROTECTED if isinstance(contender, Mergetool) else None
    found = compare(files, models.paths, contenders.ALPHA, protected=protected)
    return f"{found.unequal} of {found.elements} elements differ from float32, largest {found.largest:g}"


def results(series: Sequence[Series], size: str) -> Iterator[provenance.Result]:
    """Rows: each series against the byte copy of the same cache state, and mergetool against each peer."""
    for one in series:
        copy = copy_of(one, series)
        how = str(copy.contender.strategy) if isinstance(copy.contender, ByteCopy) else ""
        config = {"copy": how, "agreement": one.agreement}
        for metric in METRICS:
            yield _row(one, copy, metric, size, config)
    ours, rivals = pairs(series)
    for peer in rivals:
        for metric in METRICS:
            yield _row(ours, peer, metric, size, {})


def copy_of(one: Series, series: Sequence[Series]) -> Series:
    """The byte copy of everything that ran under the same cache state."""
    plain = (other for other in series if (other.contender.provider, other.contender.setting) == COPY)
    return next(other for other in plain if other.warm == one.warm)


def pairs(series: Sequence[Series]) -> tuple[Series, list[Series]]:
    """mergetool's plain run, and the peers it is compared with."""
    ours = next(one for one in series if isinstance(one.contender, Mergetool))
    return ours, [one for one in series if one.contender.provider not in ("byte copy", "mergetool")]


def _row(one: Series, reference: Series, metric: str, size: str, config: dict[str, str]) -> provenance.Result:
    values = METRICS[metric](one)
    config = {"expression": EXPRESSION, **{name: text for name, text in config.items() if text}}
    return provenance.Result(
        benchmark="merge",
        case=", ".join(filter(None, (size, one.contender.setting))),
        provider=one.contender.provider,
        metric=metric,
        values=values,
        unit="s",
        ratio_to=reference.contender.provider,
        ratio=provenance.median_ratio(values, METRICS[metric](reference)),
        cache=one.cache,
        bytes_read=one.usages[-1].read_bytes or None,
        bytes_written=one.written,
        peak_anon_mb=one.peak_anon_mb,
        peak_rss_mb=one.peak_rss_mb,
        config=config,
    )


def table(series: Sequence[Series], models: Models) -> str:
    """The results for a reader: medians, ratios to the byte copy, memory; then mergetool against each peer.

    The ratio and GB/s are those of the synced time, the only one in which all have done the same.
    """
    lines = [f"{'':38}{'seconds':>9}{'p20-p80':>14}{'synced':>9}{'x copy':>8}{'GB/s':>7}{'anon MB':>9}{'RSS MB':>9}"]
    for one in series:
        low, middle, high = (provenance.percentile(one.seconds, share) for share in (0.2, 0.5, 0.8))
        synced = provenance.percentile(one.synced, 0.5)
        ratio = provenance.median_ratio(one.synced, copy_of(one, series).synced)
        lines.append(
            f"{one.label:38}{middle:9.2f}{f'{low:.2f}-{high:.2f}':>14}{synced:9.2f}{ratio:8.2f}"
            f"{models.moved_bytes / 1e9 / synced:7.2f}{one.peak_anon_mb:9.0f}{one.peak_rss_mb:9.0f}"
        )
    ours, rivals = pairs(series)
    for peer in rivals:
        returned = provenance.median_ratio(ours.seconds, peer.seconds)
        synced = provenance.median_ratio(ours.synced, peer.synced)
        name = peer.contender.provider
        lines.append(f"mergetool / {name}: {returned:.3f} of its seconds, {synced:.3f} until synced")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the models if they are missing, run the rounds, print the table, append the rows."""
    options = _parser().parse_args(arguments)
    provenance.commit()
    models = Models.in_folder(options.dir)
    if not all(path.exists() for path in models.paths):
        command = [sys.executable, "-m", "benchmarks.generate", "family", options.dir.resolve(), "--size", options.size]
        command += ["--dtype", options.quant] if options.quant else []
        subprocess.run([*command, "--overwrite"], check=True, cwd=ROOT)
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=options.dir) as scratch:
        folder = Path(scratch)
        probe = folder / "probe.bin"
        cold = ceiling.best_strategy(models.paths, probe)
        if options.quant:
            quant = ("--quant", options.quant)
            series = [Series(ByteCopy(cold), warm=False), Series(Mergetool(quant), warm=False)]
        else:
            series = line_up(cold, contenders.peers(options.peers_python) if options.peers else [])
        if options.variants:
            series += variants(cold, ceiling.best_strategy(models.paths, probe, warm=True))
        for number in range(options.runs):
            print(f"round {number + 1} of {options.runs}", file=sys.stderr)
            run_round(series, models, folder, check=options.check)
    print(table(series, models))
    provenance.append(results(series, provenance.size_name(models.paths[0])), folder=options.dir, path=options.results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_merge", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dir", type=Path, required=True, help="holds the models; outputs come and go here too")
    parser.add_argument("--size", choices=SIZES, default="small", help="of models to make")
    parser.add_argument("--quant", choices=("fp8-scaled",), help="inputs and output in this container; no peers")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), metavar="PYTHON",
                        help="interpreter of an environment with mergekit and sd-mecha")  # fmt: skip
    parser.add_argument("--variants", action="store_true", help="also warm cache, --threads and --reader")
    parser.add_argument("--check", action="store_true", help="compare each output with float32 arithmetic, once")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    return parser


if __name__ == "__main__":
    main()
