"""Row 15: nothing is counted in 31 or 32 bits. Tensors lie across 2^31 and 2^32 in sparse files, or have more elements than that."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from mergetool.checkpoint.reader import Checkpoint
from tests.hostile.models import model, tensors
from tests.hostile.tally import Tally
from tests.hostile.warm import Warm

PLACES = [(1 << power) + step for power in (31, 32) for step in (-8, 0, 8)]
LENGTHS = [(1 << 31) - 1, 1 << 31, (1 << 31) + 1, (1 << 32) + 1]
COMMANDS = {
    "merge": ["merge", "'a.safetensors' + 3 * ('far.safetensors' - 'c.safetensors')"],
    "diff": ["diff", "--base", "a.safetensors", "--variant", "far.safetensors", "--rank", "4"],
    "merge, from a LoRA": ["merge", "'a.safetensors' + 0.5 * lora('far-lora.safetensors')"],
    "merge, quantised": ["merge", "'a.safetensors' + 3 * ('far.safetensors' - 'c.safetensors')", "--quant", "int8"],
}


def far(path: Path, stored: Mapping[str, torch.Tensor], place: int) -> Path:
    """A sparse file whose first weight begins at byte ``place``, behind a tensor of holes, which no merge takes over."""

    def header(hole: int) -> bytes:
        position = hole
        table = {"vae.hole": {"dtype": "U8", "shape": [hole], "data_offsets": [0, hole]}}
        for name, tensor in stored.items():
            size = tensor.numel() * tensor.element_size()
            table[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [position, position + size]}
            position += size
        return json.dumps(table).encode().ljust(4096)

    hole = place - 8 - 4096
    with path.open("wb") as file:
        text = header(hole)
        assert len(text) == 4096
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(place)
        for tensor in stored.values():
            file.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return path


def run(warm: Warm, folder: Path, commands: list[str], *, patched: str | None = None) -> Tally:
    """Every command with a file at every place, by both readers: the output is that of the same tensors at the start of a file."""
    tally = Tally("15", "offsets at 2^31 and 2^32, commands")
    for seed, name in ((0, "a"), (2, "c")):
        model(folder / f"{name}.safetensors", seed, large=False)
    near = tensors(1, large=False)
    lora = _lora()
    for name in commands:
        reader = ("mmap", "pread")
        save_file(near, folder / "far.safetensors")
        save_file(lora, folder / "far-lora.safetensors")
        wanted, said = _output(warm, folder, name, "mmap")
        assert not said, said  # else every place could fail as the near file does, and pass
        for place in PLACES:
            far(folder / "far.safetensors", near, place)
            far(folder / "far-lora.safetensors", lora, place)
            for way in reader:
                tally.injected += 1
                found, said = _output(warm, folder, name, way, patched)
                fault = said or ("another output" if found != wanted else None)
                tally.judge(None if fault is None else f"{name} by {way} with a file at {place}: {fault}")
    return tally


def _lora() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    found = {}
    for name in (name for name, tensor in tensors(1, large=False).items() if tensor.ndim == 2):
        module = name.removesuffix(".weight")
        found[f"{module}.lora_A.weight"] = torch.randn((2, 96), generator=generator).bfloat16()
        found[f"{module}.lora_B.weight"] = torch.randn((64, 2), generator=generator).bfloat16()
    return found


def _output(warm: Warm, folder: Path, name: str, reader: str, patched: str | None = None) -> tuple[bytes, str]:
    """The data of an output, or what was said instead; its metadata has the input's fingerprint, which counts the hole."""
    line = [*COMMANDS[name], "--reader", reader, "-o", "out.safetensors", "--overwrite"]
    line += ["--skip-unmatched"] if "lora" in line[1] else []
    ran = warm.run(line, folder, **({"patched": patched} if patched else {}))
    if ran.code != 0:
        return b"", ran.err or f"exit {ran.code}"
    raw = (folder / "out.safetensors").read_bytes()
    return raw[8 + struct.unpack("<Q", raw[:8])[0] :], ""


@contextmanager
def long_tensor(path: Path, length: int) -> Iterator[Path]:
    """A sparse file of one tensor of one byte an element: 1 first, 2 in the middle, 3 last."""
    text = json.dumps({"w": {"dtype": "F8_E4M3", "shape": [length], "data_offsets": [0, length]}}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value, at in ((1, 0), (2, length // 2), (3, length - 1)):
            file.seek(8 + len(text) + at)
            file.write(bytes([value]))
    yield path
    os.unlink(path)


def read_ends(path: Path, length: int) -> list[int]:
    """The three planted bytes, read by position and through the mapping."""
    found = []
    with Checkpoint.open(path) as checkpoint:
        file, start = checkpoint.locate("w")
        for at in (0, length // 2, length - 1):
            found.append(checkpoint.read("w", at, 1)[0])
            found.append(file.window(start + at, 1)[0])
    return found
