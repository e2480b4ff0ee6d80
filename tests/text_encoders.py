"""Small text encoders for tests: the tensors of transformers' classes, and the same under OpenCLIP's names."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from tests.sdxl import UNET, checkpoint, values

Tensors = dict[str, torch.Tensor]
SIZES: dict[str, dict[str, Any]] = {
    name: {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": 3,
        "vocab_size": 30,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "projection_dim": width,
        "max_position_embeddings": 77,
        "hidden_act": act,
    }
    for name, width, act in (("clip_l", 64, "quick_gelu"), ("clip_g", 128, "gelu"))
}
"""The sizes of CLIP-L and CLIP-G, as transformers and ComfyUI take them."""
CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
VAE = "first_stage_model.decoder.conv_in.weight"


@cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of transformers' CLIPTextModelWithProjection; ComfyUI's loader finds none missing and none too many."""
    size = SIZES[name]
    width, inner, block = size["hidden_size"], size["intermediate_size"], "text_model.encoder.layers"
    found = {"text_model.embeddings.token_embedding.weight": (size["vocab_size"], width)}
    found["text_model.embeddings.position_embedding.weight"] = (77, width)
    vectors = [f"{block}.{i}.layer_norm{n}" for i in range(size["num_hidden_layers"]) for n in (1, 2)]
    matrices = {f"self_attn.{one}_proj": (width, width) for one in ("k", "v", "q", "out")} | {
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    for i in range(size["num_hidden_layers"]):
        for module, shape in matrices.items():
            found |= {f"{block}.{i}.{module}.weight": shape, f"{block}.{i}.{module}.bias": shape[:1]}
    for module in (*vectors, "text_model.final_layer_norm"):
        found |= {f"{module}.weight": (width,), f"{module}.bias": (width,)}
    return {**found, "text_projection.weight": (width, width)}


def clip(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """The encoder's tensors by transformers' names."""
    generator = torch.Generator().manual_seed(seed)
    return {part: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for part, shape in _shapes(name).items()}


def open_clip(tensors: Tensors) -> Tensors:
    """The same as OpenCLIP stores it: q, k and v one below the other, the projection transposed."""
    modules = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    found: Tensors = {}
    for part, tensor in tensors.items():
        if part == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif part.startswith("text_model.embeddings."):
            token = "token" in part
            found["token_embedding.weight" if token else "positional_embedding"] = tensor
        elif part.startswith("text_model.final_layer_norm."):
            found[part.replace("text_model.final_layer_norm", "ln_final")] = tensor
        else:
            _, _, _, number, *rest = part.split(".")
            module, leaf = ".".join(rest[:-1]), rest[-1]
            block = f"transformer.resblocks.{number}"
            if module in modules:
                found[f"{block}.{modules[module]}.{leaf}"] = tensor
            elif module == "self_attn.q_proj":
                three = [tensors[part.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                found[f"{block}.attn.in_proj_{leaf}"] = torch.cat(three)
    return found


def beside(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """What an all-in-one file of SDXL has beside the UNet."""
    clip_l, clip_g = clip("clip_l", seed, dtype), clip("clip_g", 50 + seed, dtype)
    return {
        **{f"{CLIP_L}{name}": tensor for name, tensor in clip_l.items() if name != "text_projection.weight"},
        f"{CLIP_L}text_model.embeddings.position_ids": torch.arange(77)[None],
        **{f"{CLIP_G}{name}": tensor for name, tensor in open_clip(clip_g).items()},
        f"{CLIP_G}logit_scale": torch.tensor(4.6 + seed / 8, dtype=dtype),
        VAE: torch.full((4, 4, 3, 3), float(seed)),
    }


def all_in_one(path: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A small SDXL file with both text encoders and some of a VAE."""
    return checkpoint(path, values(seed, dtype=dtype), prefix=UNET, beside=beside(seed, dtype))
