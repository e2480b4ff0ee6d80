"""A full-size base and fine-tune made on the device, in seconds: for benchmarks on a machine that holds no models.

Real names, shapes and layout; the weights are torch's normal numbers, keyed by the tensor's name, so their bytes belong to
one kind of device, unlike those of ``benchmarks.values``. Every matrix's difference has a strength, rank, decay and noise of
its own: in the file, after rounding to BF16, some reach a threshold of 0.995 with a few directions, others with no 64.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.generate import SIZES
from mergetool.arch.families.z_image import Z_IMAGE, reference_shapes
from mergetool.checkpoint.dtypes import BF16
from mergetool.checkpoint.header import Header

WEIGHT_STD = 0.02
WRITERS = 8
_UNDER_WAY = 16  # tensors waiting to be written: 1.3 GB of host memory


def header_of(size: str) -> Header:
    """That of a BF16 model of ``size`` as ComfyUI lays it out."""
    shapes = reference_shapes(SIZES[size], "comfyui")
    stored = Z_IMAGE.outputs(reference_shapes(SIZES[size], "diffusers"), "comfyui")
    return Header.plan([(name, BF16, shapes[name]) for name, _ in stored], {"format": "pt"})


def make_pair(folder: Path, size: str, device: torch.device) -> tuple[Path, Path]:
    """Write ``base.safetensors`` and ``variant.safetensors`` of ``size`` to ``folder``; they are not synced to a disk."""
    canonical = reference_shapes(SIZES[size], "diffusers")
    stored = dict(Z_IMAGE.outputs(canonical, "comfyui"))
    header = header_of(size)
    paths = folder / "base.safetensors", folder / "variant.safetensors"
    files = [os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644) for path in paths]
    room = threading.Semaphore(_UNDER_WAY)
    pool = ThreadPoolExecutor(WRITERS)

    def write(file: int, values: Tensor, offset: int) -> None:
        try:
            view = memoryview(values.view(torch.uint8).numpy().reshape(-1).data)
            while view:
                done = os.pwrite(file, view, offset)
                view, offset = view[done:], offset + done
        finally:
            room.release()

    try:
        writes = []
        for file in files:
            os.pwrite(file, header.encode(), 0)
            os.truncate(file, header.data_start + header.data_size)
        for name, parts in stored.items():
            offset = header.data_start + header.tensors[name].begin
            for part in parts:
                both = _part(part, canonical[part], device)
                for file, values in zip(files, both, strict=True):
                    room.acquire()
                    writes.append(pool.submit(write, file, values.cpu(), offset))
                offset += both[0].nbytes
        for done in writes:
            done.result()
    finally:
        pool.shutdown()
        for file in files:
            os.close(file)
    return paths


def _part(name: str, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Base and variant of one parameter, BF16."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    draw = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))
    base = torch.randn(shape, generator=generator, device=device).mul_(WEIGHT_STD)
    if len(shape) == 1:
        base += float(name.endswith("norm.weight"))
        change = torch.randn(shape, generator=generator, device=device).mul_(0.01 * WEIGHT_STD)
    else:
        change = _difference(shape, draw, generator, device)
    base = base.bfloat16()
    return base, base.float().add_(change).bfloat16()


def _difference(
    shape: tuple[int, ...], draw: torch.Generator, generator: torch.Generator, device: torch.device
) -> Tensor:
    """Low rank plus noise: rank 4 to 48, decay 0.7 to 0.95, RMS 1 to 10 % of the weights', noise 0.3 to 30 % of that."""
    a, b, c, d = torch.rand(4, generator=draw).tolist()
    rank = min(4 + int(44 * a), *shape)
    strength = (0.7 + 0.25 * b) ** torch.arange(rank, device=device)
    strength *= WEIGHT_STD * 0.01 * 10**c / strength.square().sum().sqrt()
    up = torch.randn(shape[0], rank, generator=generator, device=device)
    down = torch.randn(rank, shape[1], generator=generator, device=device)
    noise = torch.randn(shape, generator=generator, device=device).mul_(WEIGHT_STD * 0.01 * 10**c * 0.003 * 100**d)
    return noise.addmm_(up * strength, down)


def counts(shapes: Mapping[str, tuple[int, ...]]) -> dict[tuple[int, int], int]:
    """How many matrices of at least 32 rows and columns there are of each shape, largest first."""
    found: dict[tuple[int, int], int] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and min(shape) >= 32 and name.endswith(".weight"):
            found[shape[0], shape[1]] = found.get((shape[0], shape[1]), 0) + 1
    return dict(sorted(found.items(), key=lambda item: -item[0][0] * item[0][1]))
