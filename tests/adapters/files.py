"""LoRA files of every spelling that a program loads or does not: those of `spellings`, and those that only programs tell apart."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from tests.adapters.spellings import (
    BLOCK,
    DIM,
    DOWN,
    FFN,
    SPELLINGS,
    UP,
    A,
    B,
    Written,
    f64,
    fused,
    loha,
    lokr,
    random,
    split,
)


def native(prefix: str, down: str, up: str, *, flat: bool = False) -> Written:
    """ComfyUI's names of everything but q, k and v."""
    found = split(prefix, down, up, alpha=4, flat=flat)
    wanted = "_attention_out" if flat else ".attention.out"
    renamed = Written(changes={part: c for part, c in found.changes.items() if not re.search(r"to_[qkv]", part)})
    for key, tensor in found.tensors.items():
        if not re.search(r"to_[qkv]", key):
            renamed.tensors[re.sub(r"[._]attention[._]to_out[._]0", wanted, key)] = tensor
    return renamed


def both(fused_prefix: str, split_prefix: str, down: str, up: str, *, flat: bool = False) -> Written:
    """A file with q, k and v once as one and once apart."""
    found = fused(fused_prefix, down, up, flat=flat)
    apart = split(split_prefix, down, up, flat=flat)
    found.tensors |= apart.tensors
    for part, change in apart.changes.items():
        found.changes[part] = found.changes.get(part, 0) + change
    return found


def with_magnitudes(written: Written, ending: str) -> Written:
    for key in [key for key in written.tensors if key.endswith((A, DOWN))]:
        module = key.removesuffix(A).removesuffix(DOWN)
        rows = written.tensors[next(k for k in (module + B, module + UP) if k in written.tensors)].shape[0]
        written.tensors[module + ending] = torch.ones(rows) if "vector" in ending else torch.ones(rows, 1)
    return written


def others(prefix: str, *, flat: bool = False) -> Written:
    """Modulation and refiners, whose names have underscores of their own, and the embedders."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(
        {
            f"{BLOCK}.adaLN_modulation.0": (4 * DIM, DIM),
            "context_refiner.0.feed_forward.w3": (FFN, DIM),
            "noise_refiner.0.attention.to_out.0": (DIM, DIM),
            "cap_embedder.1": (DIM, 64),
            "all_x_embedder.2-1": (DIM, 64),
            "t_embedder.mlp.0": (1024, 256),
            "all_final_layer.2-1.linear": (64, DIM),
        }.items()
    ):
        a, b = random(2, columns, seed=i), random(rows, 2, seed=50 + i)
        name = prefix + (module.replace(".", "_") if flat else module)
        found.tensors |= {name + DOWN: a, name + UP: b}
        found.changes[module + ".weight"] = f64(b) @ f64(a)
    return found


def joined(one: Written, other: Written) -> Written:
    return Written(one.tensors | other.tensors, one.changes | other.changes)


def tied() -> Written:
    """Two ranks, each of as many modules."""
    return split("transformer.", A, B, ranks=(2, 4))


FILES: dict[str, Callable[[], Written]] = {
    **SPELLINGS,
    "transformer, two ranks": tied,
    "transformer, down and up, no alpha": lambda: split("transformer.", DOWN, UP),
    "transformer, A and B without weight": lambda: split("transformer.", ".lora_A", ".lora_B"),
    "transformer, linear layers": lambda: split(
        "transformer.", ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "transformer, joined": lambda: split("transformer.", "_lora.down.weight", "_lora.up.weight"),
    "diffusion_model, A and B without weight": lambda: split("diffusion_model.", ".lora_A", ".lora_B"),
    "transformer, default": lambda: split("transformer.", ".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusion_model, dots": lambda: split("diffusion_model.", ".lora.down.weight", ".lora.up.weight", alpha=3),
    "lora_unet_ with A and B": lambda: split("lora_unet_", A, B, flat=True),
    "lora_unet_ without alpha": lambda: split("lora_unet_", DOWN, UP, flat=True),
    "other modules": lambda: others("diffusion_model."),
    "other modules, underscored": lambda: others("lora_unet_", flat=True),
    "ComfyUI's names, A and B": lambda: native("diffusion_model.", A, B),
    "ComfyUI's names, down and up": lambda: native("diffusion_model.", DOWN, UP),
    "ComfyUI's names, underscored": lambda: native("lora_unet_", DOWN, UP, flat=True),
    "ComfyUI's names after transformer.": lambda: native("transformer.", DOWN, UP),
    "ComfyUI's names, bare": lambda: native("", DOWN, UP),
    "fused and split": lambda: both("diffusion_model.", "diffusion_model.", DOWN, UP),
    "fused and split, underscored": lambda: both("lora_unet_", "lora_unet_", DOWN, UP, flat=True),
    "lycoris_, a LoRA": lambda: split("lycoris_", DOWN, UP, alpha=2, flat=True),
    "lora_transformer_": lambda: split("lora_transformer_", DOWN, UP, alpha=2, flat=True),
    "a whole checkpoint's prefix": lambda: split("model.diffusion_model.", DOWN, UP, alpha=2),
    "transformer, LoKr": lambda: lokr("transformer."),
    "transformer, LoKr, alpha": lambda: lokr("transformer.", decomposed=True, alpha=1.0),
    "bare LoKr": lambda: lokr(""),
    "underscored LoKr": lambda: lokr("lora_unet_", flat=True, decomposed=True, alpha=1.0),
    "LoHa after transformer.": lambda: loha("transformer."),
    "LoKr beside a LoRA": lambda: joined(
        lokr("diffusion_model."), Written({f"diffusion_model.{BLOCK}.attention.to_q{A}": random(4, DIM, seed=1),
        f"diffusion_model.{BLOCK}.attention.to_q{B}": random(DIM, 4, seed=2)},
        {f"{BLOCK}.attention.to_q.weight": f64(random(DIM, 4, seed=2)) @ f64(random(4, DIM, seed=1))})),
    "a whole difference beside a LoRA": lambda: joined(
        others("diffusion_model."), Written({"diffusion_model.cap_embedder.1.diff": random(DIM, 64, seed=3)},
        {"cap_embedder.1.weight": f64(random(DIM, 64, seed=3)) + others("").changes["cap_embedder.1.weight"]})),
    "A and B beside down and up": lambda: joined(split("diffusion_model.", A, B), others("diffusion_model.")),
}  # fmt: skip
DORAS: dict[str, Callable[[], Written]] = {
    "DoRA": lambda: with_magnitudes(split("diffusion_model.", A, B), ".dora_scale"),
    "DoRA, fused": lambda: with_magnitudes(fused("diffusion_model.", DOWN, UP), ".dora_scale"),
    "PEFT's DoRA after transformer.": lambda: with_magnitudes(split("transformer.", A, B), ".lora_magnitude_vector"),
    "PEFT's DoRA after diffusion_model.": lambda: with_magnitudes(
        split("diffusion_model.", A, B), ".lora_magnitude_vector"
    ),
}
