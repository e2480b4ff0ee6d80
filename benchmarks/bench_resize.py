"""One large module resized and two merged into one, against the decomposition of the dense matrix.

    python -m benchmarks.bench_resize --dir DIR [--shape 10240x3840] [--rank 128] [--to 64] [--runs 3]

Two LoRAs of ``--rank`` on one matrix of ``--shape``, BF16 factors with falling spectra. Timed, in turn in every round: the sum of both
cut to ``--to`` by the factors (`adapters.sources`, from the files' factors in memory to the float32 pair), one of them cut alike:
the dense way: the float32 product and `torch.linalg.svd` of it. Both are compared with the float64 SVD: the
largest relative error of a singular value, and of the product of the pair.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import provenance
from mergetool.lowrank.balanced import balanced
from mergetool.lowrank.low_rank import LowRank

WEIGHTS = (0.8, -0.3)


def lora(rows: int, columns: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """``up`` [rows, rank] and ``down`` [rank, columns] in BF16, their columns weaker and weaker: about 1 to 0.02."""
    random = torch.Generator().manual_seed(seed)
    decay = 0.02 ** (torch.arange(rank) / max(rank - 1, 1))
    up = torch.randn(rows, rank, generator=random) * decay.sqrt() / rows**0.5
    down = torch.randn(rank, columns, generator=random) * decay.sqrt()[:, None] / columns**0.5
    return up.bfloat16(), down.bfloat16()


def by_factors(terms: Sequence[tuple[float, tuple[Tensor, Tensor]]], rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values kept, and the pair in float32."""
    whole = LowRank.sum([(weight, LowRank(*pair)) for weight, pair in terms])
    found = whole.truncated(rank, name="bench")
    stored = balanced(found, torch.float32)
    return found.singular_values, stored.up, stored.down


def dense(
    terms: Sequence[tuple[float, tuple[Tensor, Tensor]]], rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the whole matrix in ``dtype``."""
    matrix = sum((up.to(dtype) * weight @ down.to(dtype) for weight, (up, down) in terms), torch.zeros((), dtype=dtype))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return values[:rank], left[:, :rank] * root, root[:, None] * right[:rank]


def errors(found: tuple[Tensor, Tensor, Tensor], exact: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float]:
    """The largest relative error of a singular value, and that of the product, in the Frobenius norm."""
    values = float(((found[0].double() - exact[0]) / exact[0]).abs().max())
    missed = LowRank.sum([(1, LowRank(*found[1:])), (-1, LowRank(*exact[1:]))])
    return values, missed.norm() / LowRank(*exact[1:]).norm()


def timed(work: Callable[[], tuple[Tensor, Tensor, Tensor]]) -> tuple[float, tuple[Tensor, Tensor, Tensor]]:
    """Seconds, and what came of it."""
    started = time.perf_counter()
    found = work()
    return time.perf_counter() - started, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rounds, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="any folder; names the machine's disk in the table")
    parser.add_argument("--shape", default="10240x3840")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--to", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    provenance.commit()
    rows, columns = (int(size) for size in options.shape.split("x"))
    pairs = [lora(rows, columns, options.rank, seed) for seed in range(len(WEIGHTS))]
    both, one = list(zip(WEIGHTS, pairs, strict=True)), [(1.0, pairs[0])]
    threads = torch.get_num_threads()
    by_factors(both, options.to)  # the first call of LAPACK loads it
    results = []
    for case, terms in ((f"merge {options.rank} + {options.rank}", both), (f"resize {options.rank}", one)):
        ours: list[float] = []
        single: list[float] = []
        exact = dense(terms, options.to, torch.float64)
        for _ in range(options.runs):
            torch.set_num_threads(1)  # as the command does it, a module a core
            seconds, found = timed(lambda terms=terms: by_factors(terms, options.to))  # type: ignore[misc]
            ours.append(seconds)
            torch.set_num_threads(threads)
            seconds, other = timed(lambda terms=terms: dense(terms, options.to, torch.float32))  # type: ignore[misc]
            single.append(seconds)
            print(f"{case}: factors {ours[-1]:.3f} s, dense {single[-1]:.2f} s", flush=True)
        ratio = provenance.median_ratio(ours, single)
        values, product = errors(found, exact)
        their_values, their_product = errors(other, exact)
        name = f"{case} to {options.to}, {options.shape}"
        print(f"{name}: {1 / ratio:.0f} x; singular values within {values:.1e}, product within {product:.1e}")
        dense_name = "torch.linalg.svd of the dense float32 matrix"
        results += [
            provenance.Result("resize", name, dense_name, "seconds", single, "s", dense_name, 1.0, "warm",
                              config={"threads": threads, "values": their_values, "product": their_product}),
            provenance.Result("resize", name, "mergetool", "seconds", ours, "s", dense_name, ratio, "warm",
                              config={"threads": 1}),
            provenance.Result("resize", name, "mergetool", "error of singular values against float64", [values], "relative"),
            provenance.Result("resize", name, "mergetool", "error of the product against float64", [product], "relative"),
        ]  # fmt: skip
    provenance.append(results, folder=options.dir, path=options.results)


if __name__ == "__main__":
    main()
