"""How fast do two scaled FP8 checkpoints of a published size become one in BF16, against a copy that moves the same bytes?

    python -m benchmarks.bench_fp8 --dir DIR [--family Flux.1 --size dev] [--runs 3] [--no-times]

Makes two fine-tunes of one base, of random weights, as ComfyUI stores them: the matrices that ``--quant fp8-scaled`` takes in FP8, each with a scale of its own, the
rest in BF16. Of Flux.1 dev that is 12 GB each, and 24 GB of output: DIR needs 60 GB. Each round runs the copy and then the merge ``0.6 * a + 0.4 * b``, both from an empty page
cache; the copy reads both files and writes as much as the merge does. Rows of the first merge are compared with float64, and its memory with what ``--dry-run`` promises: exits with 1 where
either does not hold. With --no-times it merges once, for that alone. The models are deleted at the end, unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from benchmarks import ceiling, provenance
from benchmarks.contenders import console_script
from benchmarks.measure import Usage, measure
from benchmarks.published import PUBLISHED, headers
from benchmarks.values import WEIGHT_STD, encode, normal
from mergetool.checkpoint import system
from mergetool.checkpoint.dtypes import BF16, F8_E4M3
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from mergetool.recipe.steps import OutputTensor

SHARES = {"a": 0.6, "b": 0.4}
SAMPLED, ROWS = 32, 64
"""Matrices, to which a quarter as many vectors are added, and rows at either end of each, that are compared with float64."""
LARGEST = 0.1
"""More than any weight that is made, of which an FP8 scale is 1/448."""
BANK, PIECE = 1 << 24, 1 << 22
"""Numbers that are drawn for a model, and how many of them are written at once: each tensor begins somewhere else among them."""


def make(folder: Path, family: str, size: str) -> dict[str, Path]:
    """Write the models; the names, dtypes and places are those that a conversion plans."""
    made = {name: folder / f"{name}-fp8.safetensors" for name in SHARES}
    source = headers(folder, family, size)
    with job.open_merge(f"'{source['c']}'", MergeOptions(quant="fp8-scaled"), fingerprints=False) as plan:
        head = plan.header.encode()
        at = {name: len(head) + info.begin for name, info in plan.header.tensors.items()}
        for seed, path in enumerate(made.values(), start=1):
            weights = (normal(0, 0, BANK) + normal(seed, 0, BANK) * np.float32(0.01)) * np.float32(WEIGHT_STD)
            banks = {F8_E4M3: encode(weights / np.float32(LARGEST / 448), F8_E4M3), BF16: encode(weights, BF16)}
            with path.open("wb") as out:
                out.write(head)
                for tensor in plan.tensors:
                    if tensor.quantiser is not None:
                        for name, data in tensor.quantiser.constants(
                            tensor.layer, (tensor.shape[0], tensor.shape[1]), scale(tensor, seed)
                        ).items():
                            os.pwrite(out.fileno(), data, at[name])
                    bank = banks[F8_E4M3 if tensor.quantiser else BF16]
                    fill(out.fileno(), at[tensor.name], prod(tensor.shape), bank, crc32(tensor.name.encode()))
                os.fsync(out.fileno())
    for path in source.values():
        path.unlink()
    return made


def fill(file: int, start: int, count: int, bank: NDArray[Any], place: int) -> None:
    """Write ``count`` numbers of a bank from byte ``start`` on, beginning at ``place`` in it."""
    while count:
        place %= len(bank)
        found = bank[place : place + min(count, PIECE)]
        os.pwrite(file, found.data.cast("B"), start)
        system.start_write_back(file, start, found.nbytes)
        place, start, count = place + len(found) + 7919, start + found.nbytes, count - len(found)


def scale(tensor: OutputTensor, seed: int) -> np.float32:
    """Another one for every tensor, and for each model by 1/1024."""
    return np.float32(LARGEST / 448 * (1 + crc32(tensor.name.encode()) % 64 / 256 + seed / 1024))


def command(models: Mapping[str, Path], out: Path) -> list[str | Path]:
    """The merge as a user types it."""
    expression = " + ".join(f"{share} * {json.dumps(str(models[name]))}" for name, share in SHARES.items())
    return [console_script(), "merge", expression, "--dtype", "bf16", "--overwrite", "-o", out]


def merge(models: Mapping[str, Path], out: Path) -> Usage:
    """Run it; RuntimeError with its words where it fails."""
    usage = measure(command(models, out))
    if usage.exit_code:
        raise RuntimeError(f"exit code {usage.exit_code}: {usage.output[-2000:]}")
    return usage


def promised(models: Mapping[str, Path], out: Path) -> int:
    """Bytes of memory that ``--dry-run`` tells of."""
    said = json.loads(measure([*command(models, out), "--dry-run", "--json"]).output)
    return int(said["memory"])


def compared(models: Mapping[str, Path], out: Path) -> tuple[int, int, int, float]:
    """Tensors and elements compared with float64 rounded once; how many differ, and the most in steps of BF16."""
    import torch
    from safetensors import safe_open

    count = unequal = 0
    most = 0.0
    with safe_open(out, "pt") as found, safe_open(models["a"], "pt") as a, safe_open(models["b"], "pt") as b:
        chosen = list(found.keys())
        random.Random(0).shuffle(chosen)
        chosen.sort(key=lambda name: len(found.get_slice(name).get_shape()) < 2)
        chosen = chosen[:SAMPLED] + chosen[-SAMPLED // 4 :]
        for name in chosen:
            exact = torch.zeros(())
            for file, share in zip((a, b), SHARES.values(), strict=True):
                stored = ends(file.get_slice(name)).double()
                scaled = f"{name.removesuffix('.weight')}.weight_scale"
                factor = file.get_tensor(scaled).double() if scaled in file.keys() else 1.0  # noqa: SIM118
                exact = exact + share * factor * stored
            wanted, got = exact.bfloat16(), ends(found.get_slice(name))
            step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-126))) - 7)
            differs = got != wanted
            count += got.numel()
            unequal += int(differs.sum())
            most = max(most, float(((got.double() - wanted.double()).abs() / step).max()))
    return len(chosen), count, unequal, most


def ends(piece: Any) -> Any:
    """The first rows of a tensor and the last."""
    import torch

    rows = piece.get_shape()[0]
    if rows <= 2 * ROWS:
        return piece[:]
    return torch.cat([piece[:ROWS].float(), piece[rows - ROWS :].float()])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the models, run the rounds, check the first, print and append the results."""
    options = _parser().parse_args(arguments)
    provenance.commit()
    options.dir.mkdir(parents=True, exist_ok=True)
    models = make(options.dir, options.family, options.size)
    out = options.dir / "merged.safetensors"
    memory, copies, merges, failed = promised(models, out), [], [], []
    inputs, cache = list(models.values()), ""
    strategy = None if options.no_times else ceiling.best_strategy(inputs, out)
    try:
        for number in range(1 if options.no_times else options.runs):
            if strategy is not None:
                size = out.stat().st_size if out.exists() else merged_size(models)
                out.unlink(missing_ok=True)
                ceiling.drop_caches(inputs)
                copies.append(ceiling.copy_to_many(inputs, out, [size], strategy))
                cache = ceiling.drop_caches(inputs)
            merges.append(merge(models, out))
            if number == 0:
                tensors, count, unequal, most = compared(models, out)
                print(
                    f"{tensors} tensors, {count} elements against float64: {unequal} differ, by {most:g} steps of BF16 at most"
                )
                if most > 1 or unequal > count / 2**10:
                    failed.append("values")
    finally:
        out.unlink(missing_ok=True)
        if not options.keep:
            shutil.rmtree(options.dir)
    anon, rss = (max(getattr(usage, peak) for usage in merges) for peak in ("peak_anon", "peak_rss"))
    print(f"memory: {anon / 1e6:.0f} MB of its own, {memory / 1e6:.0f} promised; {rss / 1e6:.0f} with mapped files")
    failed += ["memory"] * (anon > memory)
    if copies:
        measured: dict[str, Any] = {
            "peak_anon_mb": anon / 1e6,
            "peak_rss_mb": rss / 1e6,
            "bytes_read": merges[-1].read_bytes,
        }
        rows: list[provenance.Result] = []
        seconds = [usage.seconds for usage in merges]
        ratio = provenance.median_ratio(seconds, copies)
        print(
            f"merge {statistics.median(seconds):.1f} s, copy {statistics.median(copies):.1f} s ({strategy}): {ratio:.3f} x"
        )
        for provider, times, how in (("byte copy", copies, {}), ("mergetool", seconds, measured)):
            rows.append(provenance.Result(
                benchmark="merge", case=f"{options.family} {options.size}, scaled FP8 to bf16", provider=provider, metric="seconds", unit="s",
                values=times, ratio_to="byte copy", ratio=provenance.median_ratio(times, copies), cache=cache,
                config={"copy": str(strategy), "promised": memory}, **how,
            ))  # fmt: skip
        provenance.append(rows, folder=options.dir.parent, path=options.results)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def merged_size(models: Mapping[str, Path]) -> int:
    """Bytes of the merge's output."""
    with job.open_merge(f"'{models['a']}'", MergeOptions(dtype="bf16"), fingerprints=False) as plan:
        return plan.header.file_size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="for the models, made and deleted")
    parser.add_argument("--family", choices=dict.fromkeys(name for name, _ in PUBLISHED), default="Flux.1")
    parser.add_argument("--size", choices=dict.fromkeys(size for _, size in PUBLISHED), default="dev")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--no-times", action="store_true", help="merge once and check values and memory")
    parser.add_argument("--keep", action="store_true", help="do not delete the models")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    return parser


if __name__ == "__main__":
    main()
