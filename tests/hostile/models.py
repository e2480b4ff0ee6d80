"""Very small models for harnesses that run commands hundreds of times: a few layers, one of which is more than one chunk."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from mergetool.engine.jobs import CHUNK

LAYERS = [f"layers.{i}.attention.proj.weight" for i in range(4)]
LARGE = "embed.weight"


def tensors(seed: int, *, large: bool = True) -> dict[str, torch.Tensor]:
    """Fine-tunes of one base, bf16; ``large`` is a tensor of more than one chunk, so that threads share it."""
    base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed + 1)
    shapes = dict.fromkeys(LAYERS, (64, 96)) | {"norm.weight": (64,), "layers.0.attention.proj.bias": (64,)}
    if large:
        shapes[LARGE] = (CHUNK // 512 + 40, 512)
    found = {}
    for name, shape in shapes.items():
        weights = torch.randn(shape, generator=base)
        found[name] = (weights + 0.02 * torch.randn(shape, generator=own)).bfloat16()
    return found


def model(path: Path, seed: int, *, large: bool = True) -> Path:
    """One fine-tune as a file."""
    save_file(tensors(seed, large=large), path)
    return path


def family(folder: Path) -> Path:
    """``alk``, ``a`` and ``b``, the same without the large tensor as ``small-alk`` and so on, and ``lora`` for either."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(["alk", "a", "b"]):
        model(folder / f"{name}.safetensors", seed)
        model(folder / f"small-{name}.safetensors", seed, large=False)
    lora(folder / "lora.safetensors")
    return folder


def lora(path: Path, rank: int = 3) -> Path:
    """A LoRA on every layer, in PEFT's spelling."""
    generator = torch.Generator().manual_seed(9)
    factors = {}
    for name in LAYERS:
        module = name.removesuffix(".weight")
        factors[f"{module}.lora_A.weight"] = torch.randn((rank, 96), generator=generator).bfloat16() / 8
        factors[f"{module}.lora_B.weight"] = torch.randn((64, rank), generator=generator).bfloat16() / 8
    save_file(factors, path)
    return path
