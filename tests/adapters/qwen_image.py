"""Qwen-Image as the oracles are asked for it, and its LoRAs in every spelling that is met in the field, each with the change it means in float64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np

from mergetool.arch.families.qwen_image import PUBLISHED, QWEN_IMAGE
from tests.adapters.flux import written
from tests.adapters.spellings import DOWN, UP, Written, f64, random
from tests.oracles.case import Case

SMALL: Mapping[str, int] = {
    "dim": 256, "head": 128, "hidden": 1024, "patch_in": 64, "patch_out": 64, "context": 96, "transformer_blocks": 2,
}  # fmt: skip
"""Two heads of 128 channels tell rows from columns."""
CONFIG = {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 96}
"""The same model as a config of diffusers."""

DIM, MLP = SMALL["dim"], SMALL["hidden"]
ATTENTION = {
    f"transformer_blocks.1.attn.{name}": (DIM, DIM)
    for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
}
TRAINED = {
    **ATTENTION,
    "transformer_blocks.0.img_mlp.net.0.proj": (MLP, DIM),
    "transformer_blocks.0.img_mlp.net.2": (DIM, MLP),
    "transformer_blocks.1.txt_mlp.net.0.proj": (MLP, DIM),
    "transformer_blocks.1.txt_mlp.net.2": (DIM, MLP),
}
"""What musubi-tuner trains."""
BLOCKS = {
    **TRAINED,
    "transformer_blocks.0.img_mod.1": (6 * DIM, DIM),
    "transformer_blocks.1.txt_mod.1": (6 * DIM, DIM),
}
MODULES = {
    **BLOCKS,
    "img_in": (DIM, 64),
    "txt_in": (DIM, 96),
    "time_text_embed.timestep_embedder.linear_1": (DIM, 256),
    "norm_out.linear": (2 * DIM, DIM),
    "proj_out": (64, DIM),
}


def itself(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{module}.weight": change}


made = partial(written, meaning=itself)


def lokr(start: str, *, flat: bool) -> Written:
    """LyCORIS' products of Kronecker."""
    found = Written()
    for i, module in enumerate(("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.0.proj")):
        rows = MLP if "mlp" in module else DIM
        first, second = random(4, 4, seed=80 + i), random(rows // 4, DIM // 4, seed=90 + i)
        name = start + (module.replace(".", "_") if flat else module)
        found.tensors |= {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second}
        found.changes[f"{module}.weight"] = np.kron(f64(first), f64(second))
    return found


CASE = Case(
    family=QWEN_IMAGE,
    small=SMALL,
    published={"base": PUBLISHED, "Layered": {**PUBLISHED, "kinds": 2}},
    configs={"base": "QwenImage", "Layered": "QwenImage"},
    pipeline="QwenImagePipeline",
    model="QwenImageTransformer2DModel",
    config=CONFIG,
    matrices=2 * 14 + 6,
    converted=("ai-toolkit", "Lightning"),
    spellings={
        "diffusers": lambda: made("transformer.", MODULES),
        "diffusers, alphas": lambda: made("transformer.", MODULES, alpha=2.0),
        "diffusers, old": lambda: made("transformer.", MODULES, ".lora.down.weight", ".lora.up.weight"),
        "ai-toolkit": lambda: made("diffusion_model.", MODULES),
        "ai-toolkit, alphas": lambda: made("diffusion_model.", MODULES, alpha=2.0),
        "ComfyUI": lambda: made("diffusion_model.", MODULES, DOWN, UP, alpha=2.0),
        "musubi": lambda: made("lora_unet_", TRAINED, DOWN, UP, alpha=2.0, flat=True),
        "underscored, everything": lambda: made("lora_unet_", MODULES, DOWN, UP, alpha=2.0, flat=True),
        "Lightning": lambda: made("", TRAINED, DOWN, UP, alpha=2.0),
        "bare": lambda: made("", MODULES),
        "DiffSynth": lambda: made("", TRAINED, ".lora_A.default.weight", ".lora_B.default.weight"),
        "PEFT": lambda: made("base_model.model.", MODULES),
        "OneTrainer": lambda: made("lora_transformer_", MODULES, DOWN, UP, alpha=2.0, flat=True),
        "LyCORIS": lambda: made("lycoris_", MODULES, DOWN, UP, alpha=2.0, flat=True),
        "LyCORIS, no alphas": lambda: made("lycoris_", MODULES, DOWN, UP, flat=True),
        "LoKr": lambda: lokr("lora_unet_", flat=True),
        "LoKr, dotted": lambda: lokr("diffusion_model.", flat=False),
    },
)  # fmt: skip
