"""Tell files that steer a model from models: ControlNets and T2I adapters.

Families say which steer their models. ComfyUI 0.30's ``controlnet.load_controlnet_state_dict`` tells them by the same tensors. They are merged among their own kind, under the names that they have.
"""

from __future__ import annotations

from collections.abc import Collection

from mergetool.arch.families import FAMILIES

IN_FACTORS = "lora_controlnet"
"""The marker of a ControlNet-LoRA: factors, and whole tensors, of a ControlNet's difference from its model's encoder."""
_OTHERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ControlNet", ("after_proj_list.18.bias",)),
    ("ControlNet", ("controlnet_cond_embedding.conv_in.weight",)),
    ("ControlNet", ("zero_convs.0.0.weight", "input_hint_block.0.weight")),
    ("ControlNet", ("controlnet_blocks.0.weight",)),
    ("ControlNet", ("controlnet_x_embedder.weight",)),
    ("ControlNet", ("backbone.0.0.weight",)),
    ("ControlNet", ("backbone.10.blocks.0.weight",)),
    ("T2I adapter", ("adapter.body.0.resnets.0.block1.weight",)),
    ("T2I adapter", ("body.0.in_conv.weight",)),
    ("T2I adapter", ("conv_in.weight", "body.0.block2.weight")),
)


def kind_of(names: Collection[str]) -> str | None:
    """The kind of a file that steers a model, by its tensors' own names; None for another file."""
    known = {*names, *(name.partition(".")[0] for name in names)}
    kinds = [(f"{kind} of {family.name}", signs) for family in FAMILIES for kind, signs in family.controls]
    return next((kind for kind, signs in (*kinds, *_OTHERS) if known.issuperset(signs)), None)
