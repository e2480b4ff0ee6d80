"""Wan as the oracles are asked for it, and its LoRAs in every spelling that is met in the field, each with the change it means in float64."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from mergetool.arch.families.wan import T2V_14B, WAN
from tests.adapters.spellings import DOWN, UP, A, B, Written, f64, random
from tests.oracles.case import Case

DIM, FFN, TEXT, IMAGE = 256, 512, 4096, 1280
SMALL: Mapping[str, int] = {
    "dim": DIM, "hidden": FFN, "input": 36, "output": 64, "text": TEXT, "frequencies": 256, "blocks": 2,
    "added": DIM, "image": IMAGE, "pictured": DIM,
}  # fmt: skip
"""The smallest I2V that ComfyUI takes for one: its heads have 128 channels, and two of them tell rows from columns."""
DIFFUSERS = {
    "num_attention_heads": 2, "attention_head_dim": 128, "in_channels": 36, "ffn_dim": FFN, "num_layers": 2,
    "image_dim": IMAGE, "added_kv_proj_dim": DIM,
}  # fmt: skip
"""The same model as a config of diffusers."""

Shapes = Mapping[str, tuple[int, ...]]
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
_BLOCK: Mapping[str, tuple[str, tuple[int, ...]]] = {
    **{f"self_attn.{ours}": (f"attn1.{theirs}", (DIM, DIM)) for ours, theirs in _PROJECTIONS.items()},
    **{f"cross_attn.{ours}": (f"attn2.{theirs}", (DIM, DIM)) for ours, theirs in _PROJECTIONS.items()},
    "cross_attn.k_img": ("attn2.add_k_proj", (DIM, DIM)),
    "cross_attn.v_img": ("attn2.add_v_proj", (DIM, DIM)),
    "ffn.0": ("ffn.net.0.proj", (FFN, DIM)),
    "ffn.2": ("ffn.net.2", (DIM, FFN)),
}
_OUTSIDE: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1", (DIM, TEXT)),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", (DIM, DIM)),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1", (DIM, 256)),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2", (DIM, DIM)),
    "time_projection.1": ("condition_embedder.time_proj", (6 * DIM, DIM)),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj", (IMAGE, IMAGE)),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2", (DIM, IMAGE)),
    "head.head": ("proj_out", (64, DIM)),
}
_PATCHES: Mapping[str, tuple[str, tuple[int, ...]]] = {"patch_embedding": ("patch_embedding", (DIM, 36, 1, 2, 2))}
EVERY = {f"blocks.{i}.{name}": (f"blocks.{i}.{row[0]}", row[1]) for i in range(2) for name, row in _BLOCK.items()}
THEIRS = {
    **{name: row[0] for name, row in EVERY.items()},
    **{name: row[0] for name, row in {**_OUTSIDE, **_PATCHES}.items()},
}
"""ComfyUI's module -> diffusers'."""
BLOCKS: Shapes = {name: shape for name, (_, shape) in EVERY.items()}
TEXT_ONLY: Shapes = {name: shape for name, shape in BLOCKS.items() if "_img" not in name}
"""What a LoRA trained on T2V has."""
SOME: Shapes = {name: shape for name, shape in BLOCKS.items() if name.endswith(("attn.q", "ffn.2", "0.cross_attn.o"))}
MATRICES: Shapes = {**BLOCKS, **{name: shape for name, (_, shape) in _OUTSIDE.items()}}


def written(prefix: str, modules: Shapes, down: str = A, up: str = B, *, alpha: float | None = None, flat: bool = False,
            theirs: bool = False, ranks: tuple[int, ...] = (4, 2, 3)) -> Written:  # fmt: skip
    """A LoRA of ``modules``, named as ComfyUI or as diffusers does, in bf16, with ranks by turns."""
    found = Written()
    for i, (module, (rows, columns, *kernel)) in enumerate(modules.items()):
        rank = ranks[i % len(ranks)]
        a = random(rank, columns, *kernel, seed=2 * i)
        b = random(rows, rank, *(1 for _ in kernel), seed=2 * i + 1)
        own = THEIRS[module] if theirs else module
        name = prefix + (own.replace(".", "_") if flat else own)
        found.tensors |= {name + down: a, name + up: b}
        if alpha is not None:
            found.tensors[f"{name}.alpha"] = torch.tensor(alpha)
        product = f64(b).reshape(rows, rank) @ f64(a).reshape(rank, -1) * (1 if alpha is None else alpha / rank)
        found.changes[f"{THEIRS[module]}.weight"] = product.reshape(rows, columns, *kernel)
    return found


def distilled(*, whole: bool) -> Written:
    """Step distillation's: factors, differences of biases, and if ``whole`` of norms, tables of modulation and the embedder of patches."""
    found = written("diffusion_model.", TEXT_ONLY, DOWN, UP)
    differences = {
        "blocks.0.self_attn.q.diff_b": ("blocks.0.attn1.to_q.bias", (DIM,)),
        "blocks.1.ffn.0.diff_b": ("blocks.1.ffn.net.0.proj.bias", (FFN,)),
    }
    if whole:
        differences |= {
            "blocks.0.norm3.diff": ("blocks.0.norm2.weight", (DIM,)),
            "blocks.1.norm3.diff_b": ("blocks.1.norm2.bias", (DIM,)),
            "blocks.0.cross_attn.norm_k.diff": ("blocks.0.attn2.norm_k.weight", (DIM,)),
            "blocks.0.modulation.diff": ("blocks.0.scale_shift_table", (1, 6, DIM)),
            "head.modulation.diff": ("scale_shift_table", (1, 2, DIM)),
            "patch_embedding.diff": ("patch_embedding.weight", (DIM, 36, 1, 2, 2)),
            "patch_embedding.diff_b": ("patch_embedding.bias", (DIM,)),
        }
    for i, (key, (part, shape)) in enumerate(differences.items()):
        found.tensors[f"diffusion_model.{key}"] = random(*shape, seed=200 + i)
        found.changes[part] = f64(found.tensors[f"diffusion_model.{key}"])
    return found


def lokr() -> Written:
    """Kronecker factors of two modules."""
    found = Written()
    for i, (module, shape) in enumerate((name, BLOCKS[name]) for name in ("blocks.0.self_attn.v", "blocks.1.ffn.2")):
        first, second = random(4, 4, seed=80 + i), random(shape[0] // 4, shape[1] // 4, seed=90 + i)
        found.tensors |= {
            f"diffusion_model.{module}.lokr_w1": first,
            f"diffusion_model.{module}.lokr_w2": second,
        }
        found.changes[f"{THEIRS[module]}.weight"] = np.kron(f64(first), f64(second))
    return found


FIVE_D: Shapes = {**SOME, "patch_embedding": (DIM, 36, 1, 2, 2)}

CASE = Case(
    family=WAN,
    small=SMALL,
    published={
        "2.1 I2V 14B": {**T2V_14B, "input": 36, "added": 5120, "image": 1280, "pictured": 5120},
        "T2V 14B": T2V_14B,
        "2.1 T2V 1.3B": {**T2V_14B, "dim": 1536, "hidden": 8960, "blocks": 30},
        "2.2 TI2V 5B": {**T2V_14B, "dim": 3072, "hidden": 14336, "input": 48, "output": 192, "blocks": 30},
    },
    configs={"2.1 I2V 14B": "WAN21_I2V", "T2V 14B": "WAN21_T2V", "2.1 T2V 1.3B": "WAN21_T2V", "2.2 TI2V 5B": "WAN22_T2V"},
    pipeline="WanImageToVideoPipeline",
    model="WanTransformer3DModel",
    config=DIFFUSERS,
    matrices=32,
    dimensions=(2, 5),
    in_full=("patch_embedding.weight",),
    unmerged=("scale_shift_table", "blocks.0.scale_shift_table", "blocks.1.scale_shift_table"),
    converter=convert_wan_transformer_to_diffusers,
    converted=("every matrix, alphas", "diffusers", "musubi, pictures"),
    spellings={
        "ai-toolkit": lambda: written("diffusion_model.", TEXT_ONLY),
        "some modules": lambda: written("diffusion_model.", SOME),
        "alphas": lambda: written("diffusion_model.", BLOCKS, alpha=2.0),
        "down and up, alphas": lambda: written("diffusion_model.", BLOCKS, DOWN, UP, alpha=2.0),
        "every matrix": lambda: written("diffusion_model.", MATRICES),
        "every matrix, alphas": lambda: written("diffusion_model.", MATRICES, alpha=2.0),
        "musubi": lambda: written("lora_unet_", TEXT_ONLY, DOWN, UP, alpha=2.0, flat=True),
        "musubi, pictures": lambda: written("lora_unet_", BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "musubi, some modules": lambda: written("lora_unet_", SOME, DOWN, UP, alpha=2.0, flat=True),
        "Fun": lambda: written("lora_unet__", TEXT_ONLY, DOWN, UP, alpha=2.0, flat=True),
        "Fun, some modules": lambda: written("lora_unet__", SOME, DOWN, UP, alpha=2.0, flat=True),
        "diffusers": lambda: written("transformer.", MATRICES, theirs=True),
        "diffusers, alphas": lambda: written("transformer.", SOME, theirs=True, alpha=2.0),
        "diffusers' names under diffusion_model": lambda: written("diffusion_model.", SOME, theirs=True),
        "underscored diffusers": lambda: written("lora_unet_", SOME, DOWN, UP, alpha=2.0, flat=True, theirs=True),
        "bare": lambda: written("", SOME),
        "PEFT": lambda: written("base_model.model.", SOME, theirs=True),
        "distilled": lambda: distilled(whole=False),
        "distilled, whole": lambda: distilled(whole=True),
        "five dimensions": lambda: written("diffusion_model.", FIVE_D),
        "LoKr": lokr,
    },
)  # fmt: skip
