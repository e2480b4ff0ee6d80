"""Extraction on a GPU against its limits: reading both models onto it, and full SVD on it. Needs no network.

    python -m benchmarks.bench_diff_gpu [--size full] [--dir /dev/shm/pair] [--runs 3] [--results benchmarks/results.csv]

From one run on one machine, with the pair in the page cache or in /dev/shm and the process warm: (1) a pair is made on the
device (benchmarks.device_pair); (2) ceiling: both models' matrices are read and copied to the device by the extraction's
own reader, nothing computed; (3) the extraction, with and without its file; (4) its stages for a batch of each shape that is
on the device already, one after the other; (5) `torch.linalg.svd` and `torch.svd_lowrank` of one matrix of each shape, times
their number; (6) a sample of layers judged in float64 by the eigenvalues of the Gram matrix and by the stored factors.
`--device cpu` runs all of it on the CPU, at a small size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open

from benchmarks import provenance
from benchmarks.device_pair import counts, make_pair
from benchmarks.generate import SIZES
from benchmarks.provenance import Result, median_ratio, percentile
from mergetool.adapters.formats import factors_of
from mergetool.arch.families.z_image import reference_shapes
from mergetool.difference.extract import Extraction, extract, open_diff
from mergetool.difference.layer import ExtractedLayer
from mergetool.difference.on_device import READERS, Uploads, free_memory, in_batches, solve_all, subtract
from mergetool.difference.pairs import Pairing
from mergetool.lowrank import batched
from mergetool.lowrank.balanced import balanced_batch
from mergetool.lowrank.norms import energies_of
from mergetool.lowrank.rules import Rule
from mergetool.lowrank.svd import SMALL
from mergetool.options.differences import DiffOptions

OPTIONS = DiffOptions(rank_thresh=0.995, rank_max=64)
CASE = "thresh 0.995, cap 64"
SAMPLE = 6
T = TypeVar("T")


@dataclass
class Clock:
    """Seconds by name, each measured with the device idle before and after."""

    device: torch.device
    seconds: dict[str, list[float]] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.settle()
        started = time.perf_counter()
        yield
        self.settle()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read_only(pairing: Pairing, device: torch.device, readers: int = READERS) -> int:
    """Upload every batch as an extraction does and drop it; returns the bytes."""
    batches = in_batches(pairing.decomposed, free_memory(device))
    with closing(Uploads(pairing, batches, device, readers).run()) as running:
        for upload in running:
            upload.wait(None)
            upload.release(torch.cuda.current_stream(device) if device.type == "cuda" else None)
    return sum(pair.base.nbytes + pair.variant.nbytes for pair in pairing.decomposed)


def solve_only(pairing: Pairing, device: torch.device) -> None:
    def alone(pair: object) -> None:
        raise RuntimeError(f"the device had no memory for {pair}")

    for _ in solve_all(pairing, OPTIONS, device, free_memory(device), alone):  # type: ignore[arg-type]
        pass


def timed_runs(pairing: Pairing, clock: Clock, folder: Path, runs: int) -> tuple[Extraction, int]:
    """One round to warm up, then ``runs`` of reading, solving and extracting in turn; returns the last extraction."""
    found, size = Extraction(), 0
    read_only(pairing, clock.device)
    for readers in (2, 4, 8, 12, 16):
        own = Clock(clock.device)
        with own("read"):
            size = read_only(pairing, clock.device, readers)
        print(f"reading with {readers:2} threads: {size / own.seconds['read'][0] / 1e9:.1f} GB/s", flush=True)
    for number in range(runs + 1):
        prefix = "" if number else "first "
        with clock(prefix + "read"):
            size = read_only(pairing, clock.device)
        with clock(prefix + "solve"):
            solve_only(pairing, clock.device)
        with clock(prefix + "extract"):
            found = extract(pairing, folder / "lora.safetensors", OPTIONS, overwrite=True, device=clock.device)
        latest = "  ".join(f"{name} {clock.seconds[prefix + name][-1]:.2f} s" for name in ("read", "solve", "extract"))
        print(f"{'warm-up' if number == 0 else f'run {number}'}: {latest}", flush=True)
    return found, size


def stages(pairing: Pairing, clock: Clock) -> dict[str, float]:
    """Time a batch's stages on the device one by one, for one full batch of each shape; seconds of all matrices."""
    device = clock.device
    largest: dict[tuple[int, ...], list[int]] = {}
    batches = in_batches(pairing.decomposed, free_memory(device))
    for batch in batches:
        largest.setdefault(batch.pairs[0].base.shape, []).append(len(batch.pairs))
    print(f"stages, {len(batches)} batches; milliseconds of one batch, alone, and s of all matrices at that rate")
    scaled: dict[str, float] = {}
    for shape, sizes in largest.items():
        size = max(sizes)
        generator = torch.Generator(device).manual_seed(1)
        own = Clock(device)
        names = [str(i) for i in range(size)]
        base = torch.randn(size, *shape, generator=generator, device=device).bfloat16()
        low = [torch.randn(size, side, 24, generator=generator, device=device) for side in shape]
        low[0] *= 0.8 ** torch.arange(24, device=device)
        variant = (base.float() + 0.02 * low[0] @ low[1].mT).bfloat16()
        for _ in range(2):  # the first time warms up
            own.seconds.clear()
            _stages_of(base, variant, names, own)
        row = {name: seconds[0] for name, seconds in own.seconds.items()}
        for name, seconds in row.items():
            scaled[name] = scaled.get(name, 0.0) + seconds * sum(sizes) / size
        cells = "  ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in row.items())
        print(f"  {size:3} x {'x'.join(map(str, shape)):12} {cells}", flush=True)
        del base, variant, low
    print("  all, s:            ", "  ".join(f"{name} {seconds:.2f}" for name, seconds in scaled.items()), flush=True)
    return scaled


def _stages_of(base: torch.Tensor, variant: torch.Tensor, names: list[str], clock: Clock) -> None:

    with clock("subtract"):
        deltas = torch.empty(base.shape, device=base.device)
        for one, other, out in zip(base, variant, deltas, strict=True):
            subtract(one, other, out=out)
    with clock("energy"):
        energies = energies_of(deltas)
    with clock("bf16 copy"):
        sketch = deltas.bfloat16()
    if min(base.shape[1:]) > SMALL:
        tall = base.shape[1] >= base.shape[2]
        sides = (deltas, sketch) if tall else (deltas.mT, sketch.mT)
        width = batched.width_for(64)
        columns = torch.randn(len(base), min(base.shape[1:]), width, device=base.device)
        with clock("8 steps"), batched.ieee_float32():
            columns = batched._iterate(sides[1], columns, batched.STEPS, warm=False)
        with clock("certify"), batched.ieee_float32():
            batched._certify(sides[0], columns)
        gram = torch.randn(len(base), width, width, device=base.device, dtype=torch.float64)
        gram = gram @ gram.mT
        with clock("(eigen)"):
            batched._eigen(gram)
        with clock("(eigen by torch)"):
            torch.linalg.eigh(gram)
    options = {"rule": Rule(threshold=OPTIONS.threshold), "rank_max": OPTIONS.rank_max}
    with clock("decompose, all"):
        found = batched.decompose_batch(deltas, names, energies=energies, sketch=sketch, **options)  # type: ignore[arg-type]
    with clock("factors"):
        balanced_batch(found, torch.bfloat16)


def rivals(shapes: dict[tuple[int, int], int], clock: Clock, budget: float) -> dict[str, tuple[float, str]]:
    """Seconds of torch's SVD and svd_lowrank for all matrices, from one matrix a shape, and what was left out for time.

    A shape whose transpose was timed takes that time: ``svd`` starts with the smaller, and stops when ``budget`` seconds
    are gone.
    """
    device = clock.device

    def one(shape: tuple[int, int], call: Callable[[torch.Tensor], object]) -> float:
        generator = torch.Generator(device).manual_seed(1)
        delta = torch.randn(shape, generator=generator, device=device)
        delta += 10 * torch.randn(shape[0], 1, device=device) @ torch.randn(1, shape[1], device=device)
        call(delta[:64, :64].contiguous())
        own = Clock(device)
        with own("call"):
            call(delta)
        return own.seconds["call"][0]

    calls: dict[str, Callable[[torch.Tensor], object]] = {
        "torch.svd_lowrank": lambda delta: torch.svd_lowrank(delta, q=64, niter=2),
        "torch.linalg.svd": lambda delta: torch.linalg.svd(delta, full_matrices=False),
    }
    found = {}
    for name, call in calls.items():
        started, total, missing = time.perf_counter(), 0.0, []
        timed: dict[tuple[int, ...], float] = {}
        for shape, count in reversed(shapes.items()):
            key = tuple(sorted(shape))
            if key not in timed:
                if time.perf_counter() - started > budget:
                    missing.append("x".join(map(str, shape)))
                    continue
                timed[key] = one(shape, call)
                print(f"  {name} of one {shape[0]} x {shape[1]}: {timed[key]:.3f} s, times {count}", flush=True)
            total += timed[key] * count
        found[name] = total, f"without {', '.join(missing)}" if missing else "one matrix a shape, times their number"
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """One layer judged in float64: differences of what it says of itself from the truth, in shares of all energy."""

    layer: ExtractedLayer
    fewest: int  # directions that reach the threshold
    best: float  # the most energy its rank can hold
    energy: float  # that the left factor's span holds
    residual: float  # of the stored factors


def judge(pairing: Pairing, found: Extraction, lora: Path, device: torch.device) -> list[Verdict]:
    """A sample of layers of different shapes and ranks, from the bytes of the files."""
    pairs = {pair.name: pair for pair in pairing.decomposed}
    capped = sorted((layer for layer in found.layers if layer.capped), key=lambda layer: layer.energy)
    met = sorted((layer for layer in found.layers if not layer.capped), key=lambda layer: layer.rank)
    # The ends and the middle of both kinds: most energy lost, least, few directions, many.
    chosen = {
        id(layer): layer
        for kind in (capped, met)
        for layer in (kind[i * (len(kind) - 1) // 2] for i in range(3) if kind)
    }
    verdicts = []
    with safe_open(lora, "pt") as file:
        for layer in list(chosen.values())[:SAMPLE]:
            pair, sides = pairs[layer.name], []
            for model, part in ((pairing.base, pair.base), (pairing.variant, pair.variant)):
                start = part.stored.row * model.checkpoint.tensors[part.stored.tensor].row_nbytes
                raw = bytearray(model.checkpoint.read(part.stored.tensor, start, part.nbytes))
                sides.append(torch.frombuffer(raw, dtype=torch.bfloat16).view(part.shape).to(device).double())
            delta = sides[1] - sides[0]
            keys = factors_of(pairing.base.anatomy.family, layer.name)
            down, up = (file.get_tensor(key).to(device).double() for key in keys)
            gram = delta.T @ delta if delta.shape[0] >= delta.shape[1] else delta @ delta.T
            energies = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)
            total = float(energies.sum())
            span = torch.linalg.qr(up)[0]
            verdicts.append(
                Verdict(
                    layer,
                    int((energies.cumsum(0) < OPTIONS.threshold * total).sum()) + 1,
                    float(energies[: layer.rank].sum()) / total,
                    float((span.T @ delta).square().sum()) / total,
                    float((delta - up @ down).norm() / delta.norm()),
                )
            )
    return verdicts


def print_verdicts(verdicts: Sequence[Verdict]) -> bool:
    """One line each; False when one is wrong."""
    print("judged in float64: rank (fewest), energy stated - best possible, span's - best, residual stated - true")
    good = True
    for one in verdicts:
        layer = one.layer
        right = abs(layer.residual - one.residual) < 1e-4 and layer.energy <= one.best + 1e-5
        if layer.capped:
            right &= layer.rank == OPTIONS.rank_max and one.best - layer.energy < 1e-3
        else:
            right &= layer.rank == one.fewest and layer.energy >= OPTIONS.threshold - 1e-9
        good &= right
        print(
            f"  {'ok   ' if right else 'WRONG'} {layer.name:45} {layer.rank:3} ({one.fewest})"
            f"{'  capped' if layer.capped else ''}  {layer.energy - one.best:+.1e}  {one.energy - one.best:+.1e}"
            f"  {layer.residual:.5f} {layer.residual - one.residual:+.1e}"
        )
    return good


def results(size: str, clock: Clock, bytes_read: int, others: dict[str, tuple[float, str]], gpu: str) -> list[Result]:
    """The rows for the table, against reading and against the rivals."""
    reading, extracting = clock.seconds["read"], clock.seconds["extract"]
    rows = []
    for provider, name in (("read and copy", "read"), ("mergetool, no file", "solve"), ("mergetool", "extract")):
        seconds = clock.seconds[name]
        rows.append(
            Result(
                "diff gpu",
                f"{size} pair, {CASE}",
                provider,
                "seconds",
                seconds,
                "s",
                ratio_to="read and copy",
                ratio=median_ratio(seconds, reading),
                cache="warm",
                bytes_read=bytes_read,
                device=gpu,
            )
        )
    for provider, (total, how) in others.items():
        ratio = total / percentile(extracting, 0.5)
        config = {"how": how}
        rows.append(
            Result(
                "diff gpu",
                f"{size} pair, {CASE}",
                provider,
                "seconds",
                [total],
                "s",
                ratio_to="mergetool",
                ratio=ratio,
                cache="on the device",
                device=gpu,
                config=config,
            )
        )
    return rows


def attempted(what: str, call: Callable[[], T], otherwise: T) -> T:
    """``call``'s result, or ``otherwise`` after printing why not: what was timed before is not lost with it."""
    try:
        return call()
    except Exception:
        print(f"{what} failed:", flush=True)
        traceback.print_exc()
        return otherwise


def home_for(size: str) -> Path:
    """/dev/shm or the temporary folder, whichever has room for both models and the LoRA."""
    need = {"full": 27e9, "medium": 1.3e9}.get(size, 1e8)
    for place in (Path("/dev/shm"), Path(tempfile.gettempdir())):
        if place.is_dir() and shutil.disk_usage(place).free > need:
            return place / f"mergetool-pair-{size}"
    raise SystemExit(f"neither /dev/shm nor the temporary folder has {need / 1e9:.0f} GB free; name another with --dir")


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the pair, time, judge, print, append; exits with 1 when a judged layer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dir", type=Path, help="holds the pair; default: in /dev/shm or the temporary folder")
    parser.add_argument("--keep", action="store_true", help="do not delete the pair; one that is there is used again")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--svd-seconds", type=float, default=45.0, help="no SVD of a further shape after these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=provenance.RESULTS, help="the table to append to")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    folder: Path = options.dir or home_for(options.size)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["MERGETOOL_CONFIG_DIR"] = str(folder)  # no registered names: platformdirs may be missing here
    provenance.commit()
    clock, started = Clock(device), time.perf_counter()
    print(f"{gpu}, torch {torch.__version__}, {os.cpu_count()} cores, pair in {folder}", flush=True)
    try:
        paths = folder / "base.safetensors", folder / "variant.safetensors"
        if not all(path.exists() for path in paths):
            with clock("make"):
                make_pair(folder, options.size, device)
            print(f"made {sum(path.stat().st_size for path in paths) / 1e9:.1f} GB in {clock.seconds['make'][0]:.1f} s")
        with open_diff(str(paths[0]), str(paths[1]), OPTIONS) as pairing:
            found, bytes_read = timed_runs(pairing, clock, folder, options.runs)
            ranks = sorted(layer.rank for layer in found.layers)
            capped = sum(layer.capped for layer in found.layers)
            rate = bytes_read / percentile(clock.seconds["read"], 0.5) / 1e9
            methods = {m: sum(layer.method == m for layer in found.layers) for m in ("subspace", "krylov", "gram")}
            print(f"{len(ranks)} matrices, ranks {ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}, {capped} capped")
            print(f"{methods}, {rate:.1f} GB/s read and copied", flush=True)
            if device.type == "cuda":
                print(f"peak device memory {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
            lora = folder / "lora.safetensors"
            good = attempted("judging", lambda: print_verdicts(judge(pairing, found, lora, device)), False)
            good &= attempted("stages", lambda: bool(stages(pairing, clock)), False)
        shapes = counts(reference_shapes(SIZES[options.size], "diffusers"))
        none: dict[str, tuple[float, str]] = {}
        others = attempted("rivals", lambda: rivals(shapes, clock, options.svd_seconds), none)
        rows = results(provenance.size_name(paths[0]), clock, bytes_read, others, gpu)
        provenance.append(rows, folder=folder, path=options.results)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    for row in rows:
        cells = row.row()
        print(
            f"{row.provider:22}{cells['p50']:9.3f} s   {cells['ratio']:8.2f} x {row.ratio_to}   {row.config.get('how', '')}"
        )
    if not (good and others):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
