"""SD3.5 as the oracles are asked for it, and its LoRAs in every spelling that is met in the field, each with the change it means in float64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

from mergetool.arch.families.sd3 import LARGE, MEDIUM, MEDIUM_3_5, SD3
from tests.adapters.flux import written
from tests.adapters.spellings import DOWN, UP
from tests.oracles.case import Case

SMALL: Mapping[str, int] = {
    **MEDIUM_3_5, "dim": 128, "context": 96, "pooled": 48, "positions": 64, "second": 128, "transformer_blocks": 2, "dual_blocks": 1,
}  # fmt: skip
"""As many blocks as heads, as in the published models; the first has two attentions, the last ends the text stream."""
CONFIG = {
    "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "joint_attention_dim": 96, "caption_projection_dim": 128,
    "pooled_projection_dim": 48, "pos_embed_max_size": 8, "dual_attention_layers": [0], "qk_norm": "rms_norm",
}  # fmt: skip
"""The same model as a config of diffusers."""

DIM, MLP = SMALL["dim"], 4 * SMALL["dim"]
FIRST, LAST = "transformer_blocks.0", "transformer_blocks.1"
ATTENTION = {
    **{
        f"{FIRST}.attn.{name}": (DIM, DIM)
        for name in ("to_q", "to_k", "to_out.0", "add_q_proj", "add_v_proj", "to_add_out")
    },
    **{f"{FIRST}.attn2.{name}": (DIM, DIM) for name in ("to_k", "to_v", "to_out.0")},
    **{f"{LAST}.attn.{name}": (DIM, DIM) for name in ("to_v", "add_k_proj")},
}
BLOCKS = {
    **ATTENTION,
    f"{FIRST}.ff.net.0.proj": (MLP, DIM),
    f"{FIRST}.ff_context.net.2": (DIM, MLP),
    f"{FIRST}.norm1.linear": (9 * DIM, DIM),
    f"{FIRST}.norm1_context.linear": (6 * DIM, DIM),
    f"{LAST}.norm1_context.linear": (2 * DIM, DIM),
}
THEIRS = {**BLOCKS, "context_embedder": (DIM, 96), "norm_out.linear": (2 * DIM, DIM), "proj_out": (64, DIM)}
"""Some of diffusers' modules, with shapes."""
NATIVE_BLOCKS = {
    "joint_blocks.0.x_block.attn.qkv": (3 * DIM, DIM),
    "joint_blocks.0.context_block.attn.qkv": (3 * DIM, DIM),
    "joint_blocks.0.x_block.attn2.qkv": (3 * DIM, DIM),
    "joint_blocks.0.x_block.attn2.proj": (DIM, DIM),
    "joint_blocks.0.context_block.mlp.fc1": (MLP, DIM),
    "joint_blocks.1.x_block.mlp.fc2": (DIM, MLP),
    "joint_blocks.0.context_block.adaLN_modulation.1": (6 * DIM, DIM),
    "joint_blocks.1.context_block.adaLN_modulation.1": (2 * DIM, DIM),
}
NATIVE = {**NATIVE_BLOCKS, "final_layer.adaLN_modulation.1": (2 * DIM, DIM), "y_embedder.mlp.0": (DIM, 48)}
"""Some of Stability AI's modules."""


def itself(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{module}.weight": change}


def by_diffusers(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    """A change of one of Stability AI's modules as those of diffusers' parameters."""
    if module == "y_embedder.mlp.0":
        return {"time_text_embed.text_embedder.linear_1.weight": change}
    if module == "final_layer.adaLN_modulation.1":
        return {"norm_out.linear.weight": np.concatenate(np.split(change, 2)[::-1])}
    _, number, stream, inner = module.split(".", 3)
    block = f"transformer_blocks.{number}"
    if inner.endswith("qkv"):
        names = ["add_q_proj", "add_k_proj", "add_v_proj"] if stream == "context_block" else ["to_q", "to_k", "to_v"]
        attention = inner.removesuffix(".qkv")
        return {
            f"{block}.{attention}.{name}.weight": part for name, part in zip(names, np.split(change, 3), strict=True)
        }
    if inner == "adaLN_modulation.1":
        halves = np.concatenate(np.split(change, 2)[::-1]) if len(change) == 2 * DIM else change
        return {f"{block}.norm1_context.linear.weight": halves}
    renamed = {"attn2.proj": "attn2.to_out.0", "mlp.fc1": "net.0.proj", "mlp.fc2": "net.2"}[inner]
    forward = {"context_block": "ff_context.", "x_block": "ff."}[stream] if inner.startswith("mlp") else ""
    return {f"{block}.{forward}{renamed}.weight": change}


made, native = partial(written, meaning=itself), partial(written, meaning=by_diffusers)

CASE = Case(
    family=SD3,
    small=SMALL,
    published={"3.5 Medium": MEDIUM_3_5, "3.5 Large": LARGE, "3 Medium": MEDIUM},
    configs=dict.fromkeys(("3.5 Medium", "3.5 Large", "3 Medium"), "SD3"),
    pipeline="StableDiffusion3Pipeline",
    model="SD3Transformer2DModel",
    config=CONFIG,
    matrices=36,
    converter=convert_sd3_transformer_checkpoint_to_diffusers,
    converted=("diffusers", "native, down and up"),
    unmerged=("pos_embed.pos_embed",),
    spellings={
        "diffusers": lambda: made("transformer.", THEIRS),
        "diffusers, attention": lambda: made("transformer.", ATTENTION),
        "diffusers, alphas": lambda: made("transformer.", THEIRS, alpha=2.0),
        "diffusers, old": lambda: made("transformer.", THEIRS, ".lora.down.weight", ".lora.up.weight"),
        "diffusers' names under diffusion_model": lambda: made("diffusion_model.", THEIRS),
        "bare": lambda: made("", THEIRS),
        "PEFT": lambda: made("base_model.model.", THEIRS),
        "OneTrainer": lambda: made("lora_transformer_", BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "LyCORIS": lambda: made("lycoris_", BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "native": lambda: native("diffusion_model.", NATIVE),
        "native, down and up": lambda: native("diffusion_model.", NATIVE, DOWN, UP, alpha=2.0),
        "sd-scripts": lambda: native("lora_unet_", NATIVE_BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "bare native": lambda: native("", NATIVE),
    },
)
