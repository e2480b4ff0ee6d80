"""The base of Flux.1 and of families with its blocks: groups, presets, LoRAs, a config."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import Preset
from mergetool.arch.known import KnownFamily
from mergetool.arch.signs import Fp16

CONTROLNET: Mapping[str, None] = dict.fromkeys(("controlnet_x_embedder.weight", "controlnet_blocks.0.weight"))
"""Tensors of a ControlNet, which has all of a model's names."""


class FluxLike(KnownFamily):
    """A family of double blocks, which have two streams, and single blocks, which have one."""

    model: ClassVar[str]
    """diffusers' class."""
    axes: ClassVar[Mapping[int, tuple[int, ...]]] = {128: (16, 56, 56), 16: (4, 6, 6)}
    """Head width -> how it divides between the rotary axes: of the real models, and of the tests' small ones."""
    group_order: tuple[str, ...] = (
        *("double", "single", "img", "txt"),
        *("attention", "q", "k", "v", "out", "ffn", "modulation", "norm"),
        *("embedder", "final"),
    )
    # Modulations are a quarter of Flux.1: published FP8 files of 11.9 GB have them quantised too.
    quantised = frozenset({"double", "single"})
    quantised_layout = "comfyui"  # ComfyUI does not join the scales of q, k and v
    fp16: Fp16 = "capped"
    lora_prefix = "transformer."
    lora_alphas = False  # of Flux.1's proj_out is a module, and the end of the names of others; of Flux.2's diffusers rejects them
    in_comfyui = frozenset({"transformer.", "lycoris_", "lora_transformer_", ""})
    loader = "FluxLoraLoaderMixin"
    other_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "single_blocks.{i}.linear1_qkv": tuple(f"single_transformer_blocks.{{i}}.attn.to_{x}.weight" for x in "qkv"),  # USO's
        **{  # LyCORIS, in SimpleTuner
            f"transformer_blocks.{{i}}.{ff}.linear_{way}": (f"transformer_blocks.{{i}}.{ff}.net.{net}.weight",)
            for ff in ("ff", "ff_context") for way, net in (("in", "0.proj"), ("out", "2"))
        },
    }  # fmt: skip
    presets = (
        Preset("double-only", ("*=0", "double=1")),
        Preset("single-only", ("*=0", "single=1")),
        Preset("attention-only", ("*=0", "attention=1")),
        Preset("ffn-only", ("*=0", "ffn=1")),
        Preset("early-blocks", ("*=0", "double=linear(1,1/2)", "single=linear(1/2,0)")),
        Preset("late-blocks", ("*=0", "double=linear(0,1/2)", "single=linear(1/2,1)")),
    )

    def derived(self, sizes: dict[str, int]) -> dict[str, int]:
        """The columns of a single block's output."""
        return {**sizes, "both": sizes["dim"] + sizes["hidden"]}

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`.

        None for heads of a width that no known model has: the shapes do not show how it divides between the rotary axes. A model that draws
        pixels has no class.
        """
        if sizes["head"] not in self.axes or not {"patch_in", "patch_out"} <= sizes.keys():
            return None
        return {
            "_class_name": self.model,
            "attention_head_dim": sizes["head"],
            "axes_dims_rope": list(self.axes[sizes["head"]]),
            "in_channels": sizes["patch_in"],
            "joint_attention_dim": sizes["context"],
            "num_attention_heads": sizes["dim"] // sizes["head"],
            "num_layers": sizes["transformer_blocks"],
            "num_single_layers": sizes["single_transformer_blocks"],
            "out_channels": sizes["patch_out"],
            "patch_size": 1,
            **self.own_config(sizes),
        }

    def own_config(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """The entries of the config that are this family's alone, by default none."""
        return {}
