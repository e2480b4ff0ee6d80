"""ControlNets of SDXL and Stable Diffusion 1.

Each is a copy of the UNet's encoder that reads a picture, with convolutions out of every block. Canonical names are those of diffusers' ``ControlNetModel``. In the ComfyUI layout, which is that of the first releases, a file mostly has the prefix ``control_model.``; what both share
with the UNet has the UNet's names. Nothing is fused. Union models and those in factors (ControlNet-LoRA) have other modules: see `arch.control`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mergetool.arch.families import sd15, sdxl
from mergetool.arch.families.unet import CONTEXTUAL, KERNEL_3, UNet, embedders, encoder, in_layouts, kept, measures
from mergetool.arch.signs import Like, Variant
from mergetool.arch.table import Named

HINT, OUT = "controlnet_cond_embedding", "controlnet_down_blocks"
_WIDTHS = ("hint0", "hint1", "hint2", "hint3")
"""Channels of the embedder of pictures, which halves their size three times."""
_SIGNS: Mapping[tuple[str, str], Like] = {
    ("input_hint_block.0", f"{HINT}.conv_in"): KERNEL_3,
    ("zero_convs.0.0", f"{OUT}.0"): (None, None, 1, 1),
}
_UNION = ("task_embedding", "control_add_embedding.linear_1.weight")


def _control(widths: Sequence[str]) -> Iterator[Named]:
    """The rows that a UNet has not: the embedder of pictures, and a convolution behind every block."""
    yield Named(f"{HINT}.conv_in", "input_hint_block.0", ("hint",), shape=("hint0", "picture", 3, 3), bias=True)
    for i in range(2 * len(_WIDTHS) - 2):
        shape = (_WIDTHS[(i + 1) // 2], _WIDTHS[i // 2], 3, 3)
        yield Named(f"{HINT}.blocks.{i}", f"input_hint_block.{2 * i + 2}", ("hint",), shape=shape, bias=True)
    yield Named(f"{HINT}.conv_out", "input_hint_block.14", ("hint",), shape=("width0", "hint3", 3, 3), bias=True)
    for i, width in enumerate(kept(widths)):
        yield Named(f"{OUT}.{i}", f"zero_convs.{i}.0", ("zero",), shape=(width, width, 1, 1), bias=True)
    width = widths[-1]
    yield Named("controlnet_mid_block", "middle_block_out.0", ("zero",), shape=(width, width, 1, 1), bias=True)


def _measures(widths: Sequence[str]) -> Mapping[str, tuple[str, int]]:
    of_unet = {size: place for size, place in measures(widths).items() if size != "output"}
    hints = {width: (f"{HINT}.blocks.{2 * i}.weight", 1) for i, width in enumerate(_WIDTHS[:-1])}
    return {**of_unet, **hints, "hint3": (f"{HINT}.conv_out.weight", 1), "picture": (f"{HINT}.conv_in.weight", 1)}


class ControlNet(UNet):
    """A ControlNet of a UNet."""

    variants = (Variant("a difference, to be added to its model", {"difference": None}),)
    group_order = (
        *(group for group in UNet.group_order if group not in ("output_blocks", "final")),
        "hint",
        "zero",
    )
    quantised = frozenset()  # ComfyUI's loader hands no scales to a ControlNet's layers
    precise = frozenset()
    quantised_layout = None
    input_embedder = None
    component = "controlnet"
    lora_signs = ("input_hint_block", "zero_convs", HINT, OUT)
    measures: ClassVar[Mapping[str, tuple[str, int]]]

    def config_of(self, sizes: Mapping[str, int], parts: Collection[str]) -> dict[str, Any] | None:
        """See `KnownFamily.config_of`; it is a controlnet/config.json."""
        assert isinstance(self.copy_of, UNet)
        found = self.copy_of.config_of({**sizes, "output": sizes["input"]}, parts)
        if found is None:
            return None
        for key in ("sample_size", "out_channels", "up_block_types"):
            del found[key]
        return found | {
            "_class_name": "ControlNetModel",
            "conditioning_channels": sizes["picture"],
            "conditioning_embedding_out_channels": [sizes[width] for width in _WIDTHS],
        }


class SDXLControlNet(ControlNet):
    """A ControlNet of SDXL of any width and depth.

    Groups overlap; the UNet's mean what they mean there.

    - ``hint``: the embedder of the picture to follow. ``zero``: the convolutions behind the blocks, which are zero where training begins.
    """

    name = "SDXL ControlNet"
    controls = (("union", _UNION[:1]), ("union", _UNION[1:]))
    copy_of = sdxl.SDXL_UNET
    names = (
        *embedders(*sdxl.POOLED_EMBEDDER),
        *encoder(sdxl.WIDTHS, sdxl.ATTENDED, sdxl.CONTEXT),
        *_control(sdxl.WIDTHS),
    )
    signatures = in_layouts(
        {
            **_SIGNS,
            ("label_emb.0.0", "add_embedding.linear_1"): (None, sdxl.POOLED),
            (f"input_blocks.5.1.{CONTEXTUAL}", f"down_blocks.1.attentions.1.{CONTEXTUAL}"): (None, sdxl.CONTEXT),
        },
        lacks=_UNION,
    )
    measures = _measures(sdxl.WIDTHS)


class SD15ControlNet(ControlNet):
    """A ControlNet of Stable Diffusion 1 of any width.

    Groups overlap; the UNet's mean what they mean there.

    - ``hint``: the embedder of the picture to follow. ``zero``: the convolutions behind the blocks, which are zero where training begins.
    """

    name = "SD1.5 ControlNet"
    copy_of = sd15.SD15
    names = (
        *embedders(),
        *encoder(sd15.WIDTHS, sd15.ATTENDED, sd15.CONTEXT, sd15.KERNEL),
        *_control(sd15.WIDTHS),
    )
    signatures = in_layouts(
        {
            **_SIGNS,
            (f"input_blocks.2.1.{CONTEXTUAL}", f"down_blocks.0.attentions.1.{CONTEXTUAL}"): (None, sd15.CONTEXT),
            ("input_blocks.2.1.proj_in", "down_blocks.0.attentions.1.proj_in"): (None, None, 1, 1),
        },
        lacks=("label_emb.0.0.weight", "add_embedding.linear_1.weight", *_UNION),
    )
    measures = _measures(sd15.WIDTHS)


SDXL_CONTROLNET, SD15_CONTROLNET = SDXLControlNet(), SD15ControlNet()
