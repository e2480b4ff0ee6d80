"""LoRA files in every spelling that is met in the field, written by hand, each with the change it means in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

DIM, FFN = 64, 170
BLOCK = "layers.1"
MATRICES = {
    f"{BLOCK}.attention.to_q": (DIM, DIM),
    f"{BLOCK}.attention.to_k": (DIM, DIM),
    f"{BLOCK}.attention.to_v": (DIM, DIM),
    f"{BLOCK}.attention.to_out.0": (DIM, DIM),
    f"{BLOCK}.feed_forward.w1": (FFN, DIM),
    f"{BLOCK}.feed_forward.w2": (DIM, FFN),
    "noise_refiner.0.attention.to_q": (DIM, DIM),
}
NATIVE = {"attention.to_out.0": "attention.out"}


@dataclass
class Written:
    """The tensors of a file, the change of every part in float64, header metadata, and an adapter_config.json beside it."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    changes: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict[str, object] | None = None

    def save(self, folder: Path) -> Path:
        """The file's path, or the folder's where there is a config."""
        if self.config is None:
            save_file(self.tensors, folder / "lora.safetensors", self.metadata or None)
            return folder / "lora.safetensors"
        (folder / "peft").mkdir()
        save_file(self.tensors, folder / "peft" / "adapter_model.safetensors")
        (folder / "peft" / "adapter_config.json").write_text(json.dumps(self.config))
        return folder / "peft"


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(torch.bfloat16) / 4


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def split(prefix: str, down: str, up: str, *, alpha: float | None = None, flat: bool = False, says_alpha: bool = True,
          ranks: tuple[int, ...] = (4, 2, 3)) -> Written:  # fmt: skip
    """q, k and v apart, ranks mixed; ``alpha`` for every module, beside the factors or (not ``says_alpha``) elsewhere."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(MATRICES.items()):
        rank = ranks[i % len(ranks)]
        a, b = random(rank, columns, seed=2 * i), random(rows, rank, seed=2 * i + 1)
        name = prefix + (module.replace(".", "_") if flat else module)
        found.tensors |= {name + down: a, name + up: b}
        if alpha is not None and says_alpha:
            found.tensors[name + ".alpha"] = torch.tensor(float(alpha))
        found.changes[module + ".weight"] = f64(b) @ f64(a) * (1 if alpha is None else alpha / rank)
    return found


def fused(prefix: str, down: str, up: str, *, alpha: float | None = None, flat: bool = False) -> Written:
    """ComfyUI's names: q, k and v in one pair of factors."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(
        {f"{BLOCK}.attention.qkv": (3 * DIM, DIM), f"{BLOCK}.attention.out": (DIM, DIM)}.items()
    ):
        a, b = random(4, columns, seed=40 + 2 * i), random(rows, 4, seed=41 + 2 * i)
        name = prefix + (module.replace(".", "_") if flat else module)
        found.tensors |= {name + down: a, name + up: b}
        if alpha is not None:
            found.tensors[name + ".alpha"] = torch.tensor(float(alpha))
        change = f64(b) @ f64(a) * (1 if alpha is None else alpha / 4)
        if module.endswith("qkv"):
            for j, letter in enumerate("qkv"):
                found.changes[f"{BLOCK}.attention.to_{letter}.weight"] = change[j * DIM : (j + 1) * DIM]
        else:
            found.changes[f"{BLOCK}.attention.to_out.0.weight"] = change
    return found


def musubi_for_comfy() -> Written:
    """musubi-tuner's conversion: q, k and v block-diagonal in one pair, so that rank and alpha are three times as large."""
    found, rank, alpha = Written(), 2, 3.0
    downs = [random(rank, DIM, seed=60 + i) for i in range(3)]
    ups = [random(DIM, rank, seed=70 + i) for i in range(3)]
    name = f"lora_unet_{BLOCK}_attention_qkv".replace(".", "_")
    found.tensors = {
        f"{name}.lora_down.weight": torch.cat(downs),
        f"{name}.lora_up.weight": torch.block_diag(*ups),
        f"{name}.alpha": torch.tensor(3 * alpha),
    }
    for letter, down, up in zip("qkv", downs, ups, strict=True):
        found.changes[f"{BLOCK}.attention.to_{letter}.weight"] = f64(up) @ f64(down) * alpha / rank
    return found


def lokr(prefix: str, *, flat: bool = False, decomposed: bool = False, alpha: float | None = None) -> Written:
    """Kronecker factors, the second whole or a product; alpha means something only beside a product."""
    found, module = Written(), f"{BLOCK}.feed_forward.w1"
    name = prefix + (module.replace(".", "_") if flat else module)
    first = random(10, 8, seed=80)
    found.tensors[f"{name}.lokr_w1"] = first
    if decomposed:
        a, b = random(17, 2, seed=81), random(2, 8, seed=82)
        found.tensors |= {f"{name}.lokr_w2_a": a, f"{name}.lokr_w2_b": b}
        second = f64(a) @ f64(b) * (1 if alpha is None else alpha / 2)
    else:
        whole = random(17, 8, seed=83)
        found.tensors[f"{name}.lokr_w2"] = whole
        second = f64(whole)
    if alpha is not None:
        found.tensors[f"{name}.alpha"] = torch.tensor(alpha)
    found.changes[module + ".weight"] = np.kron(f64(first), second)
    return found


def loha(prefix: str) -> Written:
    """The element-wise product of two low-rank products."""
    found, module = Written(), f"{BLOCK}.attention.to_k"
    factors = {
        "w1_a": random(DIM, 3, seed=90), "w1_b": random(3, DIM, seed=91),
        "w2_a": random(DIM, 3, seed=92), "w2_b": random(3, DIM, seed=93),
    }  # fmt: skip
    found.tensors = {f"{prefix}{module}.hada_{role}": value for role, value in factors.items()}
    found.tensors[f"{prefix}{module}.alpha"] = torch.tensor(1.5)
    one, other = (f64(factors[f"{w}_a"]) @ f64(factors[f"{w}_b"]) for w in ("w1", "w2"))
    found.changes[module + ".weight"] = one * other * 1.5 / 3
    return found


def differences() -> Written:
    """ComfyUI's whole differences: a norm, a bias, a matrix."""
    found = Written()
    norm, bias, matrix = random(DIM, seed=100), random(4 * DIM, seed=101), random(DIM, FFN, seed=102)
    found.tensors = {
        f"diffusion_model.{BLOCK}.attention_norm1.diff": norm,
        f"diffusion_model.{BLOCK}.adaLN_modulation.0.diff_b": bias,
        f"diffusion_model.{BLOCK}.feed_forward.w2.diff": matrix,
    }
    found.changes = {
        f"{BLOCK}.attention_norm1.weight": f64(norm),
        f"{BLOCK}.adaLN_modulation.0.bias": f64(bias),
        f"{BLOCK}.feed_forward.w2.weight": f64(matrix),
    }
    return found


def embedders() -> Written:
    """Layers outside the blocks, under diffusers' names."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(
        {"all_x_embedder.2-1": (DIM, 64), "cap_embedder.1": (DIM, 64)}.items()
    ):
        a, b = random(2, columns, seed=110 + i), random(rows, 2, seed=120 + i)
        found.tensors |= {f"diffusion_model.{module}.lora_A.weight": a, f"diffusion_model.{module}.lora_B.weight": b}
        found.changes[module + ".weight"] = f64(b) @ f64(a)
    return found


def peft_folder() -> Written:
    """Raw PEFT: the alpha in adapter_config.json, one module with another."""
    found = split("base_model.model.", ".lora_A.weight", ".lora_B.weight", alpha=8, says_alpha=False)
    found.config = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "alpha_pattern": {f"{BLOCK}.attention.to_q": 2}}
    found.changes[f"{BLOCK}.attention.to_q.weight"] *= 2 / 8
    return found


def rank_stabilised() -> Written:
    """rsLoRA divides by the root of the rank."""
    found = split("base_model.model.", ".lora_A.weight", ".lora_B.weight", alpha=8, says_alpha=False, ranks=(4,))
    found.config = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "use_rslora": True}
    found.changes = {part: change * 4 / 2 for part, change in found.changes.items()}
    return found


def diffusers_header() -> Written:
    """diffusers' training script: the alpha in the header only, in the whole config of its adapter."""
    ranks = (4, 2, 3)
    found = split("transformer.", ".lora_A.weight", ".lora_B.weight", alpha=6, says_alpha=False, ranks=ranks)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": list(MATRICES), "bias": "none",
        "rank_pattern": {module: ranks[i % 3] for i, module in enumerate(MATRICES)}, "alpha_pattern": {},
    }  # fmt: skip
    found.metadata["lora_adapter_metadata"] = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    return found


A, B, DOWN, UP = ".lora_A.weight", ".lora_B.weight", ".lora_down.weight", ".lora_up.weight"
SPELLINGS: dict[str, Callable[[], Written]] = {
    "transformer, no alpha": lambda: split("transformer.", A, B),
    "transformer, alpha": lambda: split("transformer.", A, B, alpha=8),
    "diffusion_model, no alpha": lambda: split("diffusion_model.", A, B),
    "diffusion_model, alpha": lambda: split("diffusion_model.", A, B, alpha=8),
    "diffusion_model, down and up, alpha": lambda: split("diffusion_model.", DOWN, UP, alpha=8),
    "OneTrainer": lambda: split("transformer.", DOWN, UP, alpha=1),
    "bare": lambda: split("", A, B),
    "DiffSynth": lambda: split("", ".lora_A.default.weight", ".lora_B.default.weight"),
    "raw PEFT without a config": lambda: split("base_model.model.", A, B),
    "PEFT of a wrapped model": lambda: split("base_model.model.transformer.", A, B),
    "old diffusers": lambda: split("transformer.", ".lora.down.weight", ".lora.up.weight"),
    "musubi": lambda: split("lora_unet_", DOWN, UP, alpha=8, flat=True),
    "kohya fused": lambda: fused("lora_unet_", DOWN, UP, alpha=8, flat=True),
    "diffusion-pipe": lambda: fused("diffusion_model.", A, B),
    "ComfyUI fused, alpha": lambda: fused("diffusion_model.", DOWN, UP, alpha=8),
    "musubi converted for ComfyUI": musubi_for_comfy,
    "ComfyUI differences": differences,
    "LoKr": lambda: lokr("diffusion_model."),
    "LoKr, decomposed, alpha": lambda: lokr("diffusion_model.", decomposed=True, alpha=1.0),
    "LoKr of whole factors, a huge alpha": lambda: lokr("diffusion_model.", alpha=1e10),
    "SimpleTuner LyCORIS": lambda: lokr("lycoris_", flat=True, decomposed=True, alpha=1.0),
    "LoHa": lambda: loha("diffusion_model."),
    "embedders": embedders,
    "PEFT folder": peft_folder,
    "rsLoRA": rank_stabilised,
    "diffusers header": diffusers_header,
}  # fmt: skip
