"""One layer of a difference LoRA: how long its truncated SVD takes, and how good it is, judged in float64.

    python -m benchmarks.bench_diff_layer [--sizes 10240x3840 3840x3840] [--skip "torch.linalg.svd"] [--json]

The delta is planted: 32 directions falling by 0.9 each, and Gaussian noise with 3 % of the energy. Two questions: the
best 64 directions (what a cap of 64 leaves of a threshold of 0.995), and the fewest directions that hold a threshold.
Every provider's seconds are the least of several runs (one for those that take over 5 s); threads are torch's.

`energy` is 1 - ||delta - U S V||_F^2 / ||delta||_F^2 of the factors a provider returned, `optimal_energy` the most that
its rank can hold, `exact_rank` the fewest directions that hold the threshold; the last two from the eigenvalues of the
float64 Gram matrix.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mergetool.lowrank.krylov import fast_bfloat16
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.svd import decompose

CAP, CAPPED_THRESHOLD = 64, 0.995
Factors = tuple[Tensor, Tensor, Tensor]  # U [m, r], S [r], V^T [r, n]
Provider = Callable[[Tensor, int | None, float], Factors]  # delta, rank or None, threshold


def planted_delta(m: int, n: int, *, rank: int = 32, decay: float = 0.9, noise: float = 0.03) -> Tensor:
    """A delta [m, n] with ``rank`` directions above a flat tail that holds the share ``noise`` of its energy."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(m, rank, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(n, rank, generator=generator))[0]
    values = decay ** torch.arange(rank)
    values *= math.sqrt((1 - noise) / float(values.square().sum()))
    tail = torch.randn(m, n, generator=generator).mul_(math.sqrt(noise / (m * n)))
    return tail.addmm_(left * values, right.T).mul_(1e-2)


def _truncated(factors: Factors, delta: Tensor, rank: int | None, threshold: float) -> Factors:
    left, values, right = factors
    if rank is None:
        energies = values.double().square().cumsum(0)
        rank = int((energies < threshold * _energy(delta)).sum()) + 1
    return left[:, :rank], values[:rank], right[:rank]


def thin_svd(delta: Tensor, rank: int | None, threshold: float) -> Factors:
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    return _truncated((left, values, right), delta, rank, threshold)


def svd_lowrank(delta: Tensor, rank: int | None, threshold: float) -> Factors:
    left, values, right = torch.svd_lowrank(delta, q=CAP, niter=2)
    return _truncated((left, values, right.T), delta, rank, threshold)


def gram_eigh(delta: Tensor, rank: int | None, threshold: float) -> Factors:
    energies, vectors = torch.linalg.eigh(delta.T @ delta)
    values, right = energies.flip(0).clamp_min(0).sqrt(), vectors.flip(1).T
    _, values, right = _truncated((delta[:, :0], values, right), delta, rank, threshold)
    return (delta @ right.T) / values, values, right


def mergetool_bf16(delta: Tensor, rank: int | None, threshold: float) -> Factors:
    return _mergetool(delta, rank, threshold, delta.bfloat16())


def mergetool_fp32(delta: Tensor, rank: int | None, threshold: float) -> Factors:
    return _mergetool(delta, rank, threshold, delta)


def _mergetool(delta: Tensor, rank: int | None, threshold: float, sketch: Tensor) -> Factors:
    found = decompose(delta, name="layer", rule=Rule(threshold=threshold), rank_max=rank or 0, sketch=sketch)
    return found.left, found.singular_values, found.right


PROVIDERS: dict[str, Provider] = {
    "mergetool bf16": mergetool_bf16,
    "mergetool fp32": mergetool_fp32,
    "torch.svd_lowrank": svd_lowrank,
    "gram + eigh": gram_eigh,
    "torch.linalg.svd": thin_svd,
}


def _energy(matrix: Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in torch.split(matrix, 1024))


def _held(delta: Tensor, factors: Factors, total: float) -> float:
    left, values, right = (factor.double() for factor in factors)
    parts = zip(torch.split(delta, 1024), torch.split(left * values, 1024), strict=True)
    return 1 - sum(float((part.double() - columns @ right).square().sum()) for part, columns in parts) / total


def _spectrum(delta: Tensor) -> Tensor:
    """Squared singular values, falling, in float64."""
    gram = torch.zeros(delta.shape[1], delta.shape[1], dtype=torch.float64)
    for part in torch.split(delta, 1024):
        gram += part.double().T @ part.double()
    energies: Tensor = torch.linalg.eigvalsh(gram)
    return energies.flip(0)


def measure(provider: Provider, delta: Tensor, rank: int | None, threshold: float) -> tuple[float, Factors]:
    """Least seconds of up to five runs, and the factors of the last; the first run is the last if it takes over 5 s."""
    least, began = math.inf, time.perf_counter()
    while True:
        start = time.perf_counter()
        factors = provider(delta, rank, threshold)
        least = min(least, time.perf_counter() - start)
        if time.perf_counter() - began > min(5.0, 5 * least):
            return least, factors


def layer_rows(m: int, n: int, thresholds: Sequence[float], skip: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row for every provider and question; svd_lowrank at q=64 has no answer where more directions are needed."""
    delta = planted_delta(m, n)
    spectrum = _spectrum(delta)
    total = float(spectrum.sum())
    rows = []
    for rank, threshold in [(CAP, CAPPED_THRESHOLD), *((None, threshold) for threshold in thresholds)]:
        exact = int((spectrum.cumsum(0) < threshold * total).sum()) + 1
        for name, provider in PROVIDERS.items():
            if name in skip or (rank is None and exact > CAP and provider is svd_lowrank):
                continue
            seconds, factors = measure(provider, delta, rank, threshold)
            kept = len(factors[1])
            rows.append(
                {
                    "benchmark": "diff layer",
                    "case": f"{m}x{n} " + (f"rank {rank}" if rank else f"threshold {threshold:g}"),
                    "provider": name,
                    "seconds": seconds,
                    "energy": _held(delta, factors, total),
                    "optimal_energy": float(spectrum[:kept].sum()) / total,
                    "rank": kept,
                    "exact_rank": rank or exact,
                }
            )
            _print_row(rows[-1])
    return rows


def _print_row(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:28} {row['provider']:18} {row['seconds']:8.3f} s  rank {row['rank']:4} of {row['exact_rank']:4}  "
        f"energy {row['energy']:.6f}  best {row['optimal_energy']:.6f}  loss {row['optimal_energy'] - row['energy']:+.1e}",
        file=sys.stderr,
        flush=True,
    )


def _size(text: str) -> tuple[int, int]:
    m, n = (int(part) for part in text.split("x"))
    return m, n


def main() -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Time and judge the truncated SVD of one delta.")
    parser.add_argument("--sizes", nargs="+", type=_size, default=[(10240, 3840), (3840, 3840)], metavar="MxN")
    parser.add_argument("--thresholds", nargs="*", type=float, default=[0.95, 0.98], help="questions without a cap")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(PROVIDERS), help="providers to leave out")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON array on stdout")
    options = parser.parse_args()
    print(
        f"{torch.get_num_threads()} threads, BF16 products are {'' if fast_bfloat16() else 'not '}fast here",
        file=sys.stderr,
    )
    rows = [row for m, n in options.sizes for row in layer_rows(m, n, options.thresholds, options.skip)]
    if options.json:
        print(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
