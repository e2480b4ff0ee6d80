"""What a LoRA of a given size leaves of a difference: the ranks of --budget against every fixed rank and threshold of that size.

    python -m benchmarks.bench_budget                        the embedded models
    python -m benchmarks.bench_budget --dir DIR [--known 192]    DIR/alkahest and DIR/turbo, of any size
    python -m benchmarks.bench_budget --dir DIR --times      what a side file of spectra saves
    python -m benchmarks.bench_budget --plot                 docs/pictures/budget.png from the newest rows

A fixed rank gives a size. At that size stand every other rule, its threshold the one that fills the file best without going above,
and the budget. What is compared is the residual of all matrices together, ||difference - LoRA||_F / ||difference||_F: of the
embedded models as it is in the files; of large ones from the certified singular values of a side file with --known directions a
matrix, which is then a cap for every rule, and for the budget as it is in its files. Of 1.5, 2 and 4 times the fixed rank and no cap,
every rule has the one that suits it best.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import provenance
from benchmarks.contenders import console_script
from benchmarks.measure import Usage, measure
from mergetool.adapters.formats import factors_of
from mergetool.checkpoint.dtypes import BF16
from mergetool.difference.budget import Spectrum, file_size, ranks_for
from mergetool.difference.directions import Directions
from mergetool.difference.extract import Extraction, extract, open_diff
from mergetool.difference.spectra import SideFile
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.thresholds import RuleName
from mergetool.options.differences import DiffOptions

LAB = (("lab.alkahest", "lab.turbo"), ("lab.base", "lab.turbo"), ("lab.alkahest", "lab.deturbo"))
LAB_RANKS = (4, 8, 16, 24, 40)
FULL_RANKS = (8, 16, 32, 64, 96)
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "budget.png"
BUDGET = "--budget"


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to choose ranks: what it is called, the options that ask for it, and the ranks that it gives."""

    name: str
    options: DiffOptions
    ranks: tuple[int, ...]


@dataclass
class Spectra:
    """The matrices of one pair of models and what is known of them."""

    case: str
    matrices: list[Spectrum]
    known: list[Directions]
    metadata: dict[str, str] = field(default_factory=lambda: {"mergetool.diff": "x" * 512})

    def residual(self, ranks: Sequence[int]) -> float:
        """Before rounding, from the singular values."""
        total = sum(one.total for one in self.known)
        kept = sum(float(one.energies[:rank].sum()) for one, rank in zip(self.matrices, ranks, strict=True))
        return float(((total - kept) / total) ** 0.5)

    def size(self, ranks: Sequence[int]) -> int:
        """Bytes of the file."""
        return file_size(self.matrices, ranks, BF16, self.metadata)

    def ranks(self, rule: Rule, cap: int) -> list[int]:
        """What ``rule`` keeps of every matrix, ``cap`` at most."""
        found = []
        for matrix, known in zip(self.matrices, self.known, strict=True):
            whole = len(known.values) == min(matrix.shape)
            energies = known.energies if whole else matrix.energies
            rank = rule.rank(energies, None if whole else known.total)
            found.append(min(rank if rank is not None else known.count, known.count, cap))
        return found

    def at_size(self, name: RuleName, cap: int, size: int) -> tuple[float, list[int]] | None:
        """The threshold of a rule that gives the largest file of at most ``size`` bytes, and its ranks; None if none does."""
        low, high = (1e-6, 1.0) if name in ("energy", "sum") else (1.0, 1e-9)  # low keeps less
        if name == "ratio":
            low = 0.9997
        fits = self._fitting(name, low, cap, size)
        for _ in range(60):
            if fits is None:
                return None
            middle = (low * high) ** 0.5 if name in ("ratio", "abs") else (low + high) / 2
            more = self._fitting(name, middle, cap, size)
            low, high, fits = (low, middle, fits) if more is None else (middle, high, more)
        # Off the boundary, where the last bit of a singular value would decide.
        low *= 1.0002 if name in ("ratio", "abs") else 0.9999
        return None if fits is None else (low, self.ranks(Rule(name, low), cap))

    def _fitting(self, name: RuleName, threshold: float, cap: int, size: int) -> list[int] | None:
        ranks = self.ranks(Rule(name, threshold), cap)
        return ranks if not any(ranks) or self.size(ranks) <= size else None

    def choices(self, rank: int, rules: Sequence[RuleName]) -> Iterator[Choice]:
        """The fixed ``rank``, and every other way to fill a file of its size; the budget last."""
        fixed = [min(rank, one.count) for one in self.known]
        size = self.size(fixed)
        yield Choice(f"rank {rank}", DiffOptions(rank=rank), tuple(fixed))
        most = max(one.count for one in self.known)
        for name in rules:
            tried = []
            for cap in sorted({most, *(c for c in (3 * rank // 2, 2 * rank, 4 * rank) if c < most)}, reverse=True):
                found = self.at_size(name, cap, size)
                if found is not None and any(found[1]):
                    options = DiffOptions(rule=name, rank_thresh=found[0], rank_max=cap)
                    tried.append(Choice(f"{name} {found[0]:.4g}, cap {cap}", options, tuple(found[1])))
            if tried:
                yield min(tried, key=lambda choice: self.residual(choice.ranks))
        ranks = ranks_for(self.matrices, size, BF16, self.metadata)
        yield Choice(BUDGET, DiffOptions(budget=size, rank_max=0), tuple(ranks))


def spectra_of(base: str, variant: str, side: Path, known: int, exclude: tuple[str, ...]) -> Spectra:
    """The spectra of a pair, from ``side``, which is made with ``known`` directions a matrix where it is not there."""
    options = DiffOptions(rank=known, exclude=exclude, spectra=side)
    with open_diff(base, variant, options) as pairing:
        if not side.exists():
            start = time.perf_counter()
            extract(pairing, side.with_name("largest.safetensors"), options, overwrite=True)
            side.with_name("largest.safetensors").unlink()
            print(f"{known} directions of every matrix: {time.perf_counter() - start:.0f} s", flush=True)
        file = SideFile.open(side, pairing, options.seed)
        family = pairing.base.anatomy.family
        pairs = [pair for pair in pairing.decomposed if pair.name in file.known]
        found = [file.known[pair.name] for pair in pairs]
        matrices = [
            Spectrum(*factors_of(family, p.name), (p.base.shape[0], p.base.shape[1]), k.energies[: k.count])
            for p, k in zip(pairs, found, strict=True)
        ]
    return Spectra(f"{variant} - {base}", matrices, found)


def extraction(base: str, variant: str, side: Path, options: DiffOptions, output: Path) -> Extraction:
    """What ``options`` give."""
    options = replace(options, spectra=side)
    with open_diff(base, variant, options) as pairing:
        return extract(pairing, output, options, overwrite=True)


def residual_of(found: Extraction) -> float:
    """Of the stored pairs of all matrices together."""
    total = sum(one.total for one in found.layers)
    return float((sum(one.residual**2 * one.total for one in found.layers) / total) ** 0.5)


def compare(
    base: str,
    variant: str,
    side: Path,
    spectra: Spectra,
    ranks: Sequence[int],
    rules: Sequence[RuleName],
    exclude: tuple[str, ...],
    in_files: Callable[[Choice], bool],
) -> list[provenance.Result]:
    """One row for every size and choice; raises AssertionError where the budget is not the best of its size."""
    rows = []
    for rank in ranks:
        measured: list[tuple[Choice, int, float, dict[str, object]]] = []
        for choice in spectra.choices(rank, rules):
            size, residual = spectra.size(choice.ranks), spectra.residual(choice.ranks)
            config: dict[str, object] = {"residual": "of singular values", "ranks": _middle(choice.ranks)}
            if in_files(choice):
                output = side.with_name("lora.safetensors")
                # A budget is the size that the fixed rank has on the disk, its own metadata included.
                budget = measured[0][1] if choice.options.budget else 0
                asked = replace(choice.options, exclude=exclude, budget=budget)
                found = extraction(base, variant, side, asked, output)
                size, residual = output.stat().st_size, residual_of(found)
                config = {
                    "residual": "of the file",
                    "ranks": _middle([one.rank for one in found.layers]),
                    "searched": len(found.searched),
                }
                output.unlink()
            measured.append((choice, size, residual, config))
        best = measured[-1]
        for choice, size, residual, config in measured:
            print(f"{spectra.case:28} {size:12,} {choice.name:28} {residual:.5f} {config}", flush=True)
            # The others may be larger than the budget by what their own metadata takes.
            fair = size <= measured[0][1] + 512 and best[1] <= measured[0][1]
            assert choice.name == BUDGET or (residual > best[2] and fair), choice
            rows.append(
                provenance.Result(
                    "budget",
                    f"{spectra.case}, rank {rank}'s size",
                    choice.name,
                    "residual",
                    [residual],
                    "of the difference",
                    ratio_to=BUDGET,
                    ratio=residual / best[2],
                    bytes_written=size,
                    config=config,
                )
            )
    return rows


TIMES = {
    "no side file": ["--rank-thresh", "0.95"],
    "side file made": ["--rank-thresh", "0.95", "--spectra", "side.safetensors"],
    "side file used, another threshold": ["--rank-thresh", "0.8", "--spectra", "side.safetensors"],
    "side file used, a budget": ["--budget", "150MB", "--spectra", "side.safetensors"],
    "a budget, no side file": ["--budget", "150MB"],
}


def times(folder: Path, runs: int) -> list[provenance.Result]:
    """Rounds of every case of ``TIMES`` as a user runs it; the first to read them takes the files from the disk."""
    models: list[str | Path] = ["--base", folder / "alkahest.safetensors", "--variant", folder / "turbo.safetensors"]
    size = provenance.size_name(folder / "alkahest.safetensors")
    usages: dict[str, list[Usage]] = {case: [] for case in TIMES}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for _ in range(runs):
            for case, options in TIMES.items():
                place = [Path(scratch) / o if o.endswith(".safetensors") else o for o in options]
                if case == "side file made":
                    (Path(scratch) / "side.safetensors").unlink(missing_ok=True)
                output = Path(scratch) / "lora.safetensors"
                command = ["diff", *models, "-o", output, "--overwrite", "--json", *place]
                usage = measure([console_script(), *command])
                if usage.exit_code:
                    raise RuntimeError(usage.output)
                print(f"{case:36} {usage.seconds:.1f} s  {usage.peak_anon / 1e6:.0f} MB", flush=True)
                usages[case].append(usage)
    plain = [usage.seconds for usage in usages["no side file"]]
    return [
        provenance.Result(
            "diff spectra",
            f"{size} pair",
            case,
            "seconds",
            [usage.seconds for usage in found],
            "s",
            ratio_to="no side file",
            ratio=provenance.median_ratio([usage.seconds for usage in found], plain),
            cache="as left by the run before",
            peak_anon_mb=max(usage.peak_anon for usage in found) / 1e6,
            peak_rss_mb=max(usage.peak_rss for usage in found) / 1e6,
            config={"options": " ".join(TIMES[case])},
        )
        for case, found in usages.items()
    ]


def _middle(ranks: Sequence[int]) -> str:
    ordered = sorted(ranks)
    return f"{ordered[0]} / {ordered[len(ordered) // 2]} / {ordered[-1]}"


def plot(path: Path = PICTURE) -> None:
    """Residual over size, one picture a pair, from the newest rows of each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with provenance.RESULTS.open(newline="") as table:
        rows = [row for row in csv.DictReader(table) if row["benchmark"] == "budget"]
    newest = {(row["case"], row["provider"].split(" ")[0]): row for row in rows}
    by_pair: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for (case, rule), row in newest.items():
        points = by_pair.setdefault(case.rpartition(",")[0], {}).setdefault(rule, [])
        points.append((float(row["bytes_written"]) / 1e6, 100 * float(row["value"])))
    colours = dict(
        zip(
            ("rank", "energy", "sum", "ratio", "abs"),
            pyplot.rcParams["axes.prop_cycle"].by_key()["color"],
            strict=False,
        )
    )
    figure, axes = pyplot.subplots(1, len(by_pair), figsize=(4.2 * len(by_pair), 3.4), squeeze=False)
    for place, (pair, rules) in zip(axes[0], by_pair.items(), strict=True):
        for rule, points in rules.items():
            style = (
                {"color": "black", "linewidth": 2}
                if rule == BUDGET
                else {"color": colours[rule], "linewidth": 1, "marker": ".", "markersize": 4}
            )
            place.plot(*zip(*sorted(points), strict=True), label=rule, **style)
        place.set(title=pair, xlabel="file, MB")
        place.title.set_fontsize(9)
        place.grid(alpha=0.3)
    axes[0][0].set_ylabel("residual, % of the difference")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, print, append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="holds alkahest.safetensors and turbo.safetensors")
    parser.add_argument("--known", type=int, default=192, help="directions of every matrix to look for")
    parser.add_argument("--ranks", type=int, nargs="+", help="fixed ranks whose sizes are compared")
    parser.add_argument("--times", action="store_true", help="time what a side file saves instead")
    parser.add_argument("--plot", action="store_true", help="draw the picture from the table, and measure nothing")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    provenance.commit()
    if options.plot:
        plot()
        return
    rows = []
    if options.times:
        rows = times(options.dir, runs=1)
    elif options.dir is None:
        rules: tuple[RuleName, ...] = ("energy", "sum", "ratio", "abs")
        for base, variant in LAB:
            with tempfile.TemporaryDirectory() as scratch:
                side = Path(scratch) / "spectra.safetensors"
                spectra = spectra_of(base, variant, side, 256, ("refiner",))
                rows += compare(
                    base, variant, side, spectra, options.ranks or LAB_RANKS, rules, ("refiner",), lambda _: True
                )
    else:
        base, variant = (str(options.dir / f"{name}.safetensors") for name in ("alkahest", "turbo"))
        side = options.dir / "spectra.safetensors"
        spectra = spectra_of(base, variant, side, options.known, ())
        spectra.case = f"{provenance.size_name(Path(base))} pair"
        rows = compare(
            base,
            variant,
            side,
            spectra,
            options.ranks or FULL_RANKS,
            ("energy", "ratio", "abs"),
            (),
            lambda choice: choice.name == BUDGET,
        )
    provenance.append(rows, folder=options.dir or Path(), path=options.results)


if __name__ == "__main__":
    main()
