"""Four LoRAs baked into one checkpoint, against a byte copy of it and of them.

    python -m benchmarks.bench_bake --dir DIR [--size full] [--rank 32] [--runs 3]

Makes a BF16 checkpoint and four LoRAs of random factors on every matrix of its blocks, refiners included (split q, k and v, the
default spelling). The copy and `mergetool lora bake` run once a round, in turn, the page cache emptied before each. Prints
medians, the ratio to the copy and the memory, and appends them to benchmarks/results.csv.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks import ceiling, provenance
from benchmarks.contenders import console_script
from benchmarks.generate import SIZES
from benchmarks.measure import Usage, measure
from mergetool import models
from mergetool.checkpoint.dtypes import BF16
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.writer import CheckpointWriter
from tests.ops.oracle import encode

STRENGTHS = (0.8, -0.3, 0.5, 1.0)
ROOT = Path(__file__).resolve().parent.parent


def make_lora(model: Path, target: Path, rank: int, seed: int) -> None:
    """A LoRA of ``rank`` on every matrix of the blocks, its factors normal numbers."""
    random = np.random.default_rng(seed)
    with models.open_model(str(model)) as opened:
        matrices = [p for p in opened.anatomy.parts.values() if len(p.shape) == 2 and ".weight" in p.name]
        entries = []
        for part in matrices:
            if part.name.startswith(("layers.", "noise_refiner.", "context_refiner.")):
                module = "diffusion_model." + part.name.removesuffix(".weight")
                entries += [
                    (f"{module}.lora_A.weight", BF16, (rank, part.shape[1])),
                    (f"{module}.lora_B.weight", BF16, (part.shape[0], rank)),
                ]
    header = Header.plan(entries)
    with CheckpointWriter.stage(target, header, overwrite=True) as writer:
        for name, info in header.tensors.items():
            values = random.standard_normal(info.shape, np.float32) * np.float32(0.01)
            writer.write(name, 0, memoryview(encode(values, BF16)).cast("B"))
        writer.commit()


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, run the rounds, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dir", type=Path, required=True, help="holds the model and the LoRAs; outputs come and go here"
    )
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    provenance.commit()
    folder: Path = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model.safetensors"
    if not model.exists():
        command = [sys.executable, "-m", "benchmarks.generate", "model", model, "--size", options.size]
        subprocess.run(command, check=True, cwd=ROOT)
    loras = [folder / f"rank{options.rank}-{i}.safetensors" for i in range(len(STRENGTHS))]
    for seed, lora in enumerate(loras):
        if not lora.exists():
            make_lora(model, lora, options.rank, seed)
    inputs = (model, *loras)
    with tempfile.TemporaryDirectory(prefix="bench-bake-", dir=folder) as scratch:
        place = Path(scratch)
        strategy = ceiling.best_strategy(inputs, place / "probe.bin")
        copies, bakes, cache = [], [], ""
        for number in range(options.runs):
            cache = ceiling.drop_caches(inputs)
            copies.append(ceiling.copy(inputs, place / "copy.bin", strategy))
            (place / "copy.bin").unlink()
            cache = ceiling.drop_caches(inputs)
            bakes.append(bake(model, loras, place))
            print(f"round {number + 1}: copy {copies[-1]:.1f} s, bake {bakes[-1].seconds:.1f} s", flush=True)
    case = f"{provenance.size_name(model)}, {len(loras)} LoRAs of rank {options.rank}"
    seconds = [usage.seconds for usage in bakes]
    anon = max(usage.peak_anon for usage in bakes) / 1e6
    ratio = provenance.median_ratio(seconds, copies)
    print(f"bake / byte copy: {ratio:.2f}, {anon:.0f} MB anonymous memory")
    size = sum(path.stat().st_size for path in inputs)
    rows = [
        provenance.Result("bake", case, "byte copy", "seconds", copies, "s", ratio_to="byte copy", ratio=1.0, cache=cache,
                          bytes_read=size, bytes_written=model.stat().st_size, config={"copy": str(strategy)}),
        provenance.Result("bake", case, "mergetool", "seconds", seconds, "s", ratio_to="byte copy", ratio=ratio, cache=cache,
                          bytes_read=size, bytes_written=model.stat().st_size, peak_anon_mb=anon),
    ]  # fmt: skip
    provenance.append(rows, folder=folder, path=options.results)


def bake(model: Path, loras: Sequence[Path], place: Path) -> Usage:
    """One run of the console script into an empty folder; RuntimeError with its words when it fails."""
    out = place / "baked.safetensors"
    weighted = [f"{lora}:{strength}" for lora, strength in zip(loras, STRENGTHS, strict=True)]
    command: list[str | Path] = [console_script(), "lora", "bake", model, *weighted, "-o", out]
    usage = measure(command, env={**os.environ, "MERGETOOL_CONFIG_DIR": str(place)})
    if usage.exit_code != 0:
        raise RuntimeError(usage.output[-2000:])
    shutil.rmtree(out, ignore_errors=True)
    out.unlink(missing_ok=True)
    return usage


if __name__ == "__main__":
    main()
