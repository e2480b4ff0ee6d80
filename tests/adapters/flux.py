"""Flux.1 as the oracles are asked for it, and its LoRAs in every spelling that is met in the field, each with the change it means in float64."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
import torch
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

from mergetool.arch.families.flux import DEV, FLUX
from tests.adapters.spellings import DOWN, UP, A, B, Written, f64, random
from tests.oracles.case import Case

SMALL: Mapping[str, int] = {
    "dim": 256, "head": 128, "hidden": 1024, "both": 1280, "patch_in": 64, "patch_out": 64, "context": 96, "pooled": 48, "guidance": 256,
    "transformer_blocks": 1, "single_transformer_blocks": 2,
}  # fmt: skip
"""The smallest Flux that ComfyUI takes for one: its heads have 128 channels, and two of them tell rows from columns."""
DIFFUSERS = {
    "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 96,
    "pooled_projection_dim": 48, "guidance_embeds": True, "in_channels": 64,
}  # fmt: skip
"""The same model as a config of diffusers."""

Meaning = Callable[[str, np.ndarray], dict[str, np.ndarray]]
DIM, MLP = SMALL["dim"], SMALL["hidden"]
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
ATTENTION = {
    **{f"{DOUBLE}.attn.{name}": (DIM, DIM) for name in ("to_q", "to_k", "add_v_proj", "to_out.0", "to_add_out")},
    **{f"{SINGLE}.attn.to_{name}": (DIM, DIM) for name in "kv"},
}
BLOCKS = {
    **ATTENTION,
    f"{DOUBLE}.ff.net.0.proj": (MLP, DIM),
    f"{DOUBLE}.ff_context.net.2": (DIM, MLP),
    f"{DOUBLE}.norm1_context.linear": (6 * DIM, DIM),
    f"{SINGLE}.proj_mlp": (MLP, DIM),
    f"{SINGLE}.proj_out": (DIM, DIM + MLP),
    f"{SINGLE}.norm.linear": (3 * DIM, DIM),
}
THEIRS = {**BLOCKS, "context_embedder": (DIM, 96), "norm_out.linear": (2 * DIM, DIM), "proj_out": (64, DIM)}
"""Some of diffusers' modules, with shapes."""
NATIVE_BLOCKS = {
    "double_blocks.0.img_attn.qkv": (3 * DIM, DIM),
    "double_blocks.0.txt_attn.proj": (DIM, DIM),
    "double_blocks.0.img_mlp.0": (MLP, DIM),
    "double_blocks.0.txt_mod.lin": (6 * DIM, DIM),
    "single_blocks.1.linear2": (DIM, DIM + MLP),
    "single_blocks.1.modulation.lin": (3 * DIM, DIM),
}
NATIVE = {
    **NATIVE_BLOCKS,
    "single_blocks.1.linear1": (3 * DIM + MLP, DIM),
    "txt_in": (DIM, 96),
    "final_layer.adaLN_modulation.1": (2 * DIM, DIM),
    "final_layer.linear": (64, DIM),
}
"""Some of Black Forest Labs' modules."""


def by_diffusers(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    """A change of one of Black Forest Labs' modules as those of diffusers' parameters."""
    block = re.sub(r"double_blocks\.(\d+)\..*", r"transformer_blocks.\1", module)
    block = re.sub(r"single_blocks\.(\d+)\..*", r"single_transformer_blocks.\1", block)
    q, k, v = (f"{block}.attn.to_{letter}" for letter in "qkv")
    match module.split(".", 2)[-1] if "blocks" in module else module:
        case "img_attn.qkv" | "linear1_qkv":
            names = [q, k, v]
        case "linear1":
            names = [q, k, v, f"{block}.proj_mlp"]
        case "final_layer.adaLN_modulation.1":
            shift, scale = np.split(change, 2)
            return {"norm_out.linear.weight": np.concatenate([scale, shift])}
        case inner:
            renamed = {
                "img_attn.proj": "attn.to_out.0", "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "txt_mod.lin": "norm1_context.linear",
                "linear2": "proj_out", "modulation.lin": "norm.linear", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
            }[inner]  # fmt: skip
            names = [f"{block}.{renamed}" if "blocks" in module else renamed]
    rows = np.split(change, [DIM, 2 * DIM, 3 * DIM][: len(names) - 1])
    return {f"{name}.weight": part for name, part in zip(names, rows, strict=True)}


def written(prefix: str, modules: Mapping[str, tuple[int, int]], down: str = A, up: str = B, *, alpha: float | None = None,
            flat: bool = False, ranks: tuple[int, ...] = (4, 2, 3), meaning: Meaning | None = None) -> Written:  # fmt: skip
    """A LoRA of ``modules``, in bf16, with ranks by turns; ``meaning`` says which parameters of diffusers a module's change is."""
    found = Written()
    for i, (module, (rows, columns)) in enumerate(modules.items()):
        rank = ranks[i % len(ranks)]
        a, b = random(rank, columns, seed=2 * i), random(rows, rank, seed=2 * i + 1)
        name = prefix + (module.replace(".", "_") if flat else module)
        found.tensors |= {name + down: a, name + up: b}
        if alpha is not None:
            found.tensors[f"{name}.alpha"] = torch.tensor(alpha)
        change = f64(b) @ f64(a) * (1 if alpha is None else alpha / rank)
        found.changes |= (meaning or _of_flux)(module, change)
    return found


def _of_flux(module: str, change: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{module}.weight": change} if module in THEIRS else by_diffusers(module, change)


def xlabs(prefix: str = "") -> Written:
    """Processors of both streams, and of a single block."""
    found = Written()
    for i, (name, module, rows) in enumerate((
        ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv", 3 * DIM),
        ("double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", DIM),
        ("single_blocks.1.processor.qkv_lora", "single_blocks.1.linear1_qkv", 3 * DIM),
    )):  # fmt: skip
        down, up = random(3, DIM, seed=60 + i), random(rows, 3, seed=70 + i)
        found.tensors |= {f"{prefix}{name}.down.weight": down, f"{prefix}{name}.up.weight": up}
        found.changes |= by_diffusers(module, f64(up) @ f64(down))
    return found


def lokr() -> Written:
    """SimpleTuner's: LyCORIS' own names for the feed-forward."""
    found = Written()
    for i, (name, module) in enumerate(
        (("transformer_blocks_0_ff_linear_in", f"{DOUBLE}.ff.net.0.proj"), (f"{SINGLE}.proj_mlp", f"{SINGLE}.proj_mlp"))
    ):
        first, second = random(4, 4, seed=80 + i), random(MLP // 4, DIM // 4, seed=90 + i)
        start = f"lycoris_{name.replace('.', '_')}"
        found.tensors |= {f"{start}.lokr_w1": first, f"{start}.lokr_w2": second}
        found.changes[f"{module}.weight"] = np.kron(f64(first), f64(second))
    return found


CASE = Case(
    family=FLUX,
    small=SMALL,
    published={
        "dev": DEV, "Fill": {**DEV, "patch_in": 384}, "schnell": {name: size for name, size in DEV.items() if name != "guidance"},
    },
    configs={"dev": "Flux", "Fill": "FluxInpaint", "schnell": "FluxSchnell"},
    pipeline="FluxPipeline",
    model="FluxTransformer2DModel",
    config=DIFFUSERS,
    matrices=36,
    renamed=True,
    converter=convert_flux_transformer_checkpoint_to_diffusers,
    converted=("diffusers, alphas", "ai-toolkit, native", "OneTrainer, attention"),
    spellings={
        "diffusers": lambda: written("transformer.", THEIRS),
        "diffusers, alphas": lambda: written("transformer.", THEIRS, alpha=2.0),
        "diffusers, down and up": lambda: written("transformer.", THEIRS, DOWN, UP),
        "diffusers, down and up, alphas": lambda: written("transformer.", THEIRS, DOWN, UP, alpha=2.0),
        "diffusers, old": lambda: written("transformer.", THEIRS, ".lora.down.weight", ".lora.up.weight"),
        "diffusers' names under diffusion_model": lambda: written("diffusion_model.", THEIRS),
        "bare diffusers": lambda: written("", THEIRS),
        "PEFT": lambda: written("base_model.model.", THEIRS),
        "PEFT, native": lambda: written("base_model.model.", NATIVE),
        "OneTrainer": lambda: written("lora_transformer_", THEIRS, DOWN, UP, alpha=2.0, flat=True),
        "OneTrainer, attention": lambda: written("lora_transformer_", ATTENTION, DOWN, UP, alpha=2.0, flat=True),
        "OneTrainer, attention, no alphas": lambda: written("lora_transformer_", ATTENTION, DOWN, UP, flat=True),
        "LyCORIS": lambda: written("lycoris_", THEIRS, DOWN, UP, alpha=2.0, flat=True),
        "ai-toolkit, native": lambda: written("diffusion_model.", NATIVE),
        "native, down and up": lambda: written("diffusion_model.", {**NATIVE_BLOCKS, "txt_in": NATIVE["txt_in"]}, DOWN, UP, alpha=2.0),
        "bare native": lambda: written("", NATIVE),
        "sd-scripts": lambda: written("lora_unet_", NATIVE_BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "sd-scripts, final layer": lambda: written("lora_unet_", {n: s for n, s in NATIVE.items() if "linear1" not in n}, DOWN, UP, alpha=2.0, flat=True),
        "underscored diffusers": lambda: written("lora_unet_", BLOCKS, DOWN, UP, alpha=2.0, flat=True),
        "q, k and v of linear1": lambda: written("diffusion_model.", {"single_blocks.1.linear1_qkv": (3 * DIM, DIM)}),
        "xlabs": xlabs,
        "xlabs under diffusion_model": lambda: xlabs("diffusion_model."),
        "LoKr": lokr,
    },
)  # fmt: skip
