"""Flux.2 as the oracles are asked for it, and its LoRAs in every spelling that is met in the field, each with the change it means in float64."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

import numpy as np
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

from mergetool.arch.families.flux2 import DEV, FLUX2, KLEIN_4B, KLEIN_9B
from tests.adapters.flux import written
from tests.adapters.spellings import DOWN, UP, Written, f64, random
from tests.oracles.case import Case

DIM, MLP = 256, 768
SMALL: Mapping[str, int] = {
    "dim": DIM, "head": 128, "hidden": MLP, "both": DIM + MLP, "patch_in": 128, "patch_out": 128, "context": 96, "guidance": DIM,
    "transformer_blocks": 1, "single_transformer_blocks": 2,
}  # fmt: skip
"""Two heads of 128 channels tell rows from columns."""
CONFIG = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 96,
    "guidance_embeds": True,
}  # fmt: skip
"""The same model as a config of diffusers."""

DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
BLOCKS = {
    **{f"{DOUBLE}.attn.{name}": (DIM, DIM) for name in ("to_q", "to_k", "add_v_proj", "to_out.0", "to_add_out")},
    f"{DOUBLE}.ff.linear_in": (2 * MLP, DIM),
    f"{DOUBLE}.ff_context.linear_out": (DIM, MLP),
    f"{SINGLE}.attn.to_qkv_mlp_proj": (3 * DIM + 2 * MLP, DIM),
    f"{SINGLE}.attn.to_out": (DIM, DIM + MLP),
}
EMBEDDERS = {"x_embedder": (DIM, 128), "context_embedder": (DIM, 96), "proj_out": (128, DIM)}
MAPPED = {**BLOCKS, **EMBEDDERS, "norm_out.linear": (2 * DIM, DIM)}
THEIRS = {
    **MAPPED,
    "time_guidance_embed.timestep_embedder.linear_1": (DIM, 256),
    "double_stream_modulation_img.linear": (6 * DIM, DIM),
    "single_stream_modulation.linear": (3 * DIM, DIM),
}
"""Some of diffusers' modules, with shapes."""
NATIVE_BLOCKS = {
    "double_blocks.0.img_attn.qkv": (3 * DIM, DIM),
    "double_blocks.0.txt_attn.proj": (DIM, DIM),
    "double_blocks.0.img_mlp.0": (2 * MLP, DIM),
    "single_blocks.1.linear1": (3 * DIM + 2 * MLP, DIM),
    "single_blocks.1.linear2": (DIM, DIM + MLP),
}
NATIVE = {
    **NATIVE_BLOCKS,
    "txt_in": (DIM, 96),
    "time_in.out_layer": (DIM, DIM),
    "double_stream_modulation_txt.lin": (6 * DIM, DIM),
    "final_layer.adaLN_modulation.1": (2 * DIM, DIM),
    "final_layer.linear": (128, DIM),
}
"""Some of Black Forest Labs' modules."""
RENAMED = {
    "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.linear_in", "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out", "txt_in": "context_embedder", "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear", "final_layer.linear": "proj_out",
}  # fmt: skip


def meaning(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    """Which parameters of diffusers a module's change is."""
    if module in THEIRS:
        return {f"{module}.weight": change}
    if module == "final_layer.adaLN_modulation.1":
        shift, scale = np.split(change, 2)
        return {"norm_out.linear.weight": np.concatenate([scale, shift])}
    block = re.match(r"(double|single)_blocks\.(\d+)\.", module)
    start = f"{'single_' * (block[1] == 'single')}transformer_blocks.{block[2]}." if block else ""
    inner = module[block.end() :] if block else module
    if inner == "img_attn.qkv":
        return {f"{start}attn.to_{x}.weight": rows for x, rows in zip("qkv", np.split(change, 3), strict=True)}
    return {f"{start}{RENAMED[inner]}.weight": change}


made = partial(written, meaning=meaning)


def lokr(start: str, modules: Mapping[str, tuple[int, int]], *, flat: bool = False) -> Written:
    """Products of Kronecker."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(modules.items()):
        first, second = random(4, 4, seed=80 + i), random(rows // 4, columns // 4, seed=90 + i)
        name = start + (module.replace(".", "_") if flat else module)
        found.tensors |= {f"{name}.lokr_w1": first, f"{name}.lokr_w2": second}
        found.changes |= meaning(module, np.kron(f64(first), f64(second)))
    return found


OUR_LOKR = {name: NATIVE[name] for name in ("single_blocks.1.linear1", "double_blocks.0.img_mlp.0", "txt_in")}
THEIR_LOKR = {name: BLOCKS[name] for name in (f"{SINGLE}.attn.to_qkv_mlp_proj", f"{DOUBLE}.attn.to_q", f"{DOUBLE}.ff.linear_in")}  # fmt: skip

CASE = Case(
    family=FLUX2,
    small=SMALL,
    published={"dev": DEV, "Klein 9B": KLEIN_9B, "Klein 4B": KLEIN_4B},
    configs=dict.fromkeys(("dev", "Klein 9B", "Klein 4B"), "Flux2"),
    pipeline="Flux2KleinPipeline",
    model="Flux2Transformer2DModel",
    config=CONFIG,
    matrices=12 + 2 * 2 + 4 + 3 + 3 + 1,
    unmapped=("time_guidance_embed", "double_stream_modulation", "single_stream_modulation"),
    converter=convert_flux2_transformer_checkpoint_to_diffusers,
    converted=("diffusers, mapped", "ai-toolkit, blocks"),
    spellings={
        "diffusers": lambda: made("transformer.", THEIRS),
        "diffusers, mapped": lambda: made("transformer.", MAPPED),
        "diffusers, alphas": lambda: made("transformer.", MAPPED, alpha=2.0),
        "diffusers' names under diffusion_model": lambda: made("diffusion_model.", BLOCKS),
        "bare diffusers": lambda: made("", THEIRS),
        "PEFT": lambda: made("base_model.model.", BLOCKS),
        "PEFT, native": lambda: made("base_model.model.", NATIVE),
        "OneTrainer": lambda: made("lora_transformer_", MAPPED, DOWN, UP, alpha=2.0, flat=True),
        "LyCORIS": lambda: made("lycoris_", MAPPED, DOWN, UP, alpha=2.0, flat=True),
        "ai-toolkit": lambda: made("diffusion_model.", NATIVE),
        "ai-toolkit, blocks": lambda: made("diffusion_model.", NATIVE_BLOCKS),
        "ai-toolkit, alphas": lambda: made("diffusion_model.", NATIVE, alpha=2.0),
        "ComfyUI": lambda: made("diffusion_model.", NATIVE, DOWN, UP, alpha=2.0),
        "bare native": lambda: made("", NATIVE),
        "sd-scripts": lambda: made("lora_unet_", NATIVE, DOWN, UP, alpha=2.0, flat=True),
        "LoKr": lambda: lokr("diffusion_model.", OUR_LOKR),
        "LoKr, LyCORIS": lambda: lokr("lycoris_", THEIR_LOKR, flat=True),
        "LoKr, bare": lambda: lokr("", THEIR_LOKR),
    },
)  # fmt: skip
