"""Write synthetic Z-Image checkpoints of any size, with the real tensor names and shapes.

    python -m benchmarks.generate family DIR --size small     alkahest, turbo and deturbo: three fine-tunes of one base
    python -m benchmarks.generate model OUT.safetensors --size full --delta-seed 7 --delta-rank 16

Nothing is held but a few blocks of 2 MiB a thread, so a 12.3 GB file needs no more memory than a small one.
The same seed gives the same base weights in every layout, dtype and container (see ``benchmarks.values``).
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

import numpy as np

from mergetool.arch.families.z_image import Z_IMAGE, reference_shapes
from mergetool.checkpoint.dtypes import BF16, F8_E4M3, OUTPUT, DType
from mergetool.checkpoint.header import Header
from mergetool.checkpoint.outputs import Target, is_file_name
from mergetool.checkpoint.writer import CheckpointWriter
from mergetool.quant import register
from mergetool.quant.quantiser import TensorEntry

if TYPE_CHECKING:
    from benchmarks.values import Block, Delta

Stored = tuple[DType, tuple[int, ...], list[tuple[str, tuple[int, ...]]]]
"""A stored tensor's dtype and shape, and its parts with theirs."""

FAMILY_SEEDS: Mapping[str, int] = {"alkahest": 101, "turbo": 102, "deturbo": 103}


def _config(dim: int, layers: int, refiners: int, heads: int, axes: list[int], caption: int) -> dict[str, Any]:
    """A transformer/config.json; everything not given is as in the published model."""
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": axes,
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": caption,
        "dim": dim,
        "in_channels": 16,
        "n_heads": heads,
        "n_kv_heads": heads,
        "n_layers": layers,
        "n_refiner_layers": refiners,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 256.0,
        "t_scale": 1000.0,
    }


# bf16 sizes on disk: 1.6 MB, 11 MB, 0.54 GB, 3.3 GB (matrices as large as the full ones), 12.3 GB.
SIZES: Mapping[str, dict[str, Any]] = {
    "tiny": _config(64, 2, 1, 2, [8, 12, 12], 64),
    "small": _config(192, 4, 2, 6, [8, 12, 12], 256),
    "medium": _config(1024, 16, 2, 8, [32, 48, 48], 2560),
    "short": _config(3840, 5, 2, 30, [32, 48, 48], 2560),
    "full": _config(3840, 30, 2, 30, [32, 48, 48], 2560),
}


@dataclass(frozen=True, slots=True)
class Spec:
    """What to write. ``delta`` None is the base itself; ``shard_size`` in bytes makes a folder of shards.

    With dtype fp8_e4m3 only the matrices are FP8 and the rest stays BF16, as published FP8 files are made. ``scaled`` makes the
    matrices of attention and feed-forward outside the refiners ComfyUI's scaled FP8, each with a scale that its largest value
    would have, to about 20 %; ``dtype`` is then that of the rest.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: SIZES["full"])
    layout: str = "comfyui"
    dtype: DType = BF16
    seed: int = 0
    delta: Delta | None = None
    prefix: str = ""
    shard_size: int | None = None
    scaled: bool = False


def generate(target: Path, spec: Spec, *, threads: int | None = None, overwrite: bool = False) -> int:
    """Write the checkpoint `spec` describes to `target` and return its tensors' bytes.

    A target ending in .safetensors is one file; any other is a folder of shards with index and config.json.
    The bytes do not depend on `threads` (default: one a core). Raises OutputError when the target exists and
    `overwrite` is false, UsageError for a layout Z-Image does not have.
    """
    stored = _stored_tensors(spec)
    constants = _constants(stored, spec)
    entries = [(name, dtype, shape) for name, (dtype, shape, _) in stored.items()]
    entries += [entry for entry, _ in constants.values()]
    header = Header.plan(entries, {"format": "pt"})
    config = (json.dumps(spec.config, indent=2, sort_keys=True) + "\n").encode()
    target.parent.mkdir(parents=True, exist_ok=True)
    single = is_file_name(target)
    with CheckpointWriter.stage(
        Target(target, "file" if single else "folder"),
        header,
        overwrite=overwrite,
        shard_size=spec.shard_size,
        extra_files={} if single else {"config.json": config},
    ) as out:
        for name, (_, data) in constants.items():
            out.write(name, 0, memoryview(data))
        _write_blocks(out, _pieces(header, stored, spec), spec, threads or os.cpu_count() or 1)
        out.commit()
    return header.data_size


def family(folder: Path, spec: Spec, delta: Delta) -> dict[Path, Spec]:
    """alkahest, turbo and deturbo in `folder`: `spec` with a delta of their own each, and nothing else different.

    Returns what to generate where: one file each, or one folder of shards when `spec` has a shard size.
    """
    suffix = ".safetensors" if spec.shard_size is None else ""
    return {
        folder / f"{name}{suffix}": replace(spec, delta=replace(delta, seed=seed))
        for name, seed in FAMILY_SEEDS.items()
    }


@dataclass(frozen=True, slots=True)
class _Piece:
    """A block, and the byte of the stored tensor its first element goes to."""

    block: Block
    tensor: str
    start: int
    dtype: DType
    scale: float


def _stored_tensors(spec: Spec) -> dict[str, Stored]:
    """Stored name -> its dtype, its shape, and its parts (name, shape) in row order; in file order."""
    canonical = reference_shapes(spec.config, "diffusers")
    shapes = reference_shapes(spec.config, spec.layout)
    stored = {}
    for name, parts in Z_IMAGE.outputs(canonical, spec.layout):
        shape = shapes[name]
        matrix = len(shape) == 2 and name.endswith(".weight")
        dtype = BF16 if spec.dtype == F8_E4M3 and not matrix else spec.dtype
        if spec.scaled and _is_scaled(parts):
            dtype = F8_E4M3
        stored[spec.prefix + name] = (dtype, shape, [(part, canonical[part]) for part in parts])
    return stored


def _is_scaled(parts: Sequence[str]) -> bool:
    groups = Z_IMAGE.groups(parts[0], ())
    return bool(groups & {"attention", "ffn"}) and not groups & {"refiner", "norm"}


def _scale(tensor: str, spec: Spec) -> float:
    """Another one for every tensor and model, so that no two of them can be mistaken for each other."""
    seed = 0 if spec.delta is None else spec.delta.seed
    return 0.1 / 448 * (1 + crc32(f"{tensor} {seed}".encode()) % 64 / 256)


def _constants(stored: Mapping[str, Stored], spec: Spec) -> dict[str, tuple[TensorEntry, bytes]]:
    """Scales and markers by name, each with what the header says of it."""
    constants: dict[str, tuple[TensorEntry, bytes]] = {}
    for name, (_, shape, parts) in stored.items():
        if spec.scaled and _is_scaled([part for part, _ in parts]):
            quantiser, layer = register.quantiser("fp8-scaled"), name.removesuffix(".weight")
            entries = {entry[0]: entry for entry in quantiser.entries(layer, (shape[0], shape[1]))}
            made = quantiser.constants(layer, (shape[0], shape[1]), np.float32(_scale(name, spec)))
            constants |= {other: (entries[other], data) for other, data in made.items()}
    return constants


def _pieces(header: Header, stored: Mapping[str, Stored], spec: Spec) -> Iterator[_Piece]:
    """Every block of every tensor, in the order of the file."""
    from benchmarks.values import blocks

    for tensor in header.tensors:
        if tensor not in stored:
            continue
        dtype, _, parts = stored[tensor]
        scaled = spec.scaled and _is_scaled([part for part, _ in parts])
        start = 0
        for name, shape in parts:
            for block in blocks(name, shape):
                yield _Piece(block, tensor, start, dtype, _scale(tensor, spec) if scaled else 1.0)
                start += block.rows * block.columns * dtype.itemsize


def _write_blocks(out: CheckpointWriter, pieces: Iterator[_Piece], spec: Spec, threads: int) -> None:
    """Generate and write every piece; the threads draw from one iterator, so the file grows front to back."""
    from benchmarks.values import encode, values

    lock = threading.Lock()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            made = values(piece.block, spec.seed, spec.delta)
            if piece.scale != 1:
                made /= np.float32(piece.scale)
            data = encode(made, piece.dtype)
            out.write(piece.tensor, piece.start, data.data.cast("B"))

    with ThreadPoolExecutor(threads) as pool:
        workers = [pool.submit(work) for _ in range(threads)]
        try:
            for worker in as_completed(workers):
                worker.result()
        finally:
            stop.set()  # one thread's failure, or Ctrl-C, ends the others


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write what it asks for; prints each file's size and seconds."""
    # A block's small product runs in each of our threads. A BLAS that starts its own threads for it makes
    # them fight: 32 ns an element instead of 2.2 on two cores. numpy reads this when it is first imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    options = _parser().parse_args(arguments)
    from benchmarks.values import Delta

    spec = Spec(
        config=SIZES[options.size],
        layout=options.layout,
        dtype=BF16 if options.dtype == "fp8-scaled" else OUTPUT[options.dtype],
        scaled=options.dtype == "fp8-scaled",
        seed=options.seed,
        prefix=options.prefix,
        shard_size=round(options.shard_size * 1e9) if options.shard_size else None,
    )
    delta = Delta(
        seed=options.delta_seed or 0,
        rank=options.delta_rank,
        decay=options.delta_decay,
        relative=options.delta_size,
        noise=options.noise,
        uneven=options.uneven,
    )
    targets = {options.target: replace(spec, delta=None if options.delta_seed is None else delta)}
    if options.what == "family":
        targets = family(options.target, spec, delta)
    for target, member in targets.items():
        begin = time.perf_counter()
        size = generate(target, member, threads=options.threads, overwrite=options.overwrite)
        seconds = time.perf_counter() - begin
        print(f"{target}  {size / 1e6:,.1f} MB  {seconds:.1f} s  {size / 1e6 / seconds:,.0f} MB/s", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", choices=("family", "model"), help="three fine-tunes in a folder, or one checkpoint")
    parser.add_argument("target", type=Path, help="the folder (family), or the file or folder of shards (model)")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--layout", choices=Z_IMAGE.layouts, default="comfyui")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32", "fp8_e4m3", "fp8-scaled"), default="bf16")
    parser.add_argument("--prefix", default="", help='before every tensor name, e.g. "model.diffusion_model."')
    parser.add_argument("--shard-size", type=float, metavar="GB", help="write a folder of shards of at most this size")
    parser.add_argument("--seed", type=int, default=0, help="of the base weights")
    parser.add_argument("--delta-seed", type=int, help="makes a model a fine-tune; without it, it is the base")
    parser.add_argument("--delta-rank", type=int, default=32, help="of each matrix's low-rank part")
    parser.add_argument("--delta-decay", type=float, default=0.9, help="ratio of one singular value to the one before")
    parser.add_argument("--delta-size", type=float, default=0.01, help="RMS of the low-rank part over the base's")
    parser.add_argument("--noise", type=float, default=0.1, help="RMS of the noise over the low-rank part's")
    parser.add_argument(
        "--uneven", type=float, default=0.0, help="how much sizes and decays differ by matrix, in octaves"
    )
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--overwrite", action="store_true")
    return parser


if __name__ == "__main__":
    main()
