"""Chroma (HD, Base, Flash, Radiance): Flux.1's blocks, modulated by one small network.

Canonical names are those of diffusers' ``ChromaTransformer2DModel``; the other layout is Flux.1's with the same fused tensors, and nothing is swapped.
Radiance, which draws pixels, has no class in diffusers: its parts beside the blocks have the names of ComfyUI's ``ChromaRadiance``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import NATIVE
from mergetool.arch.families.flux import DOUBLE, FLUX, SINGLE
from mergetool.arch.families.flux_like import CONTROLNET, FluxLike
from mergetool.arch.known import Signature, Variant
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named
from mergetool.errors import FamilyError

APPROXIMATOR = "distilled_guidance_layer"
X0, SEQUENTIAL = "__x0__", "__sequential__"
"""Tensors of no elements, by which ComfyUI tells that Radiance predicts pictures, and counts the tokens of a prompt."""

_APPROXIMATOR = (
    Named("in_proj", shape=("inner", "index"), bias=True),
    Named("layers.{i}", inside=(
        Named("linear_1", "in_layer", shape=("inner", "inner"), bias=True),
        Named("linear_2", "out_layer", shape=("inner", "inner"), bias=True),
    )),
    Named("norms.{i}.weight", "norms.{i}.scale", ("norm",), shape=("inner",)),
    Named("out_proj", shape=("dim", "inner"), bias=True),
)  # fmt: skip
_NERF = (
    Named("nerf_image_embedder.embedder.0", groups=("nerf", "embedder"), shape=("nerf", "nerf_in"), bias=True),
    Named("nerf_blocks.{i}", groups=("nerf",), inside=(
        Named("param_generator", shape=("nerf_rows", "dim"), bias=True),
        Named("norm.weight", "norm.scale", ("norm",), shape=("nerf",)),
    )),
    Named("nerf_final_layer", groups=("nerf", "final"), inside=(
        Named("norm.weight", "norm.scale", ("norm",), shape=("nerf_linear",)),
        Named("linear", shape=("colours", "nerf_linear"), bias=True),
    )),
    Named("nerf_final_layer_conv", groups=("nerf", "final"), inside=(
        Named("norm.weight", "norm.scale", ("norm",), shape=("nerf_conv",)),
        Named("conv", shape=("colours", "nerf_conv", 3, 3), bias=True),
    )),
)  # fmt: skip


def _unmodulated(rows: tuple[Named, ...]) -> tuple[Named, ...]:
    return tuple(row for row in rows if "modulation" not in row.groups)


_LATENT = "HD, Base or Flash"


class Chroma(FluxLike):
    """Chroma of any width and depth.

    Groups overlap, and mean what they mean of Flux.1.

    - ``approximator``: the network that makes the modulations of all blocks; there is no group ``modulation``.
    - ``nerf``: everything by which Radiance reads and draws pixels.
    """

    name = "Chroma"
    model = "ChromaTransformer2DModel"
    names = (
        Named("x_embedder", "img_in", ("img", "embedder"), shape=("dim", "patch_in"), bias=True),
        Named("img_in_patch", groups=("img", "embedder"), shape=("dim", "colours", "patch", "patch"), bias=True),
        Named("context_embedder", "txt_in", ("txt", "embedder"), shape=("dim", "context"), bias=True),
        Named(APPROXIMATOR, groups=("approximator",), inside=_APPROXIMATOR),
        Named("transformer_blocks.{i}", "double_blocks.{i}", ("double",), inside=_unmodulated(DOUBLE)),
        Named("single_transformer_blocks.{i}", "single_blocks.{i}", ("single",), inside=_unmodulated(SINGLE)),
        Named("proj_out", "final_layer.linear", ("final",), shape=("patch_out", "dim"), bias=True),
        *_NERF,
        *(Named(marker, groups=("nerf",)) for marker in (X0, SEQUENTIAL)),
    )  # fmt: skip
    signatures = (
        Signature(
            "comfyui",
            has=dict.fromkeys(("double_blocks.0.img_attn.norm.key_norm.scale", f"{APPROXIMATOR}.norms.0.scale")),
            lacks=CONTROLNET,
        ),
        Signature(
            "diffusers",
            has=dict.fromkeys(("transformer_blocks.0.attn.norm_added_k.weight", f"{APPROXIMATOR}.norms.0.weight")),
            lacks={**CONTROLNET, "double_blocks.0.img_attn.norm.key_norm.scale": None},
        ),
    )
    sampling = (SamplingDefaults("Chroma", 35, "cfg", 5.0),)
    variants = (
        Variant("Radiance that predicts pictures", has={"img_in_patch.weight": None, X0: None}),
        Variant("Radiance", has={"img_in_patch.weight": None}),
        Variant(_LATENT, lacks={"img_in_patch.weight": None}),
    )
    stock = (
        Stock("Flash", (_LATENT,), ("flash",), of=("Base",), distilled=True),
        Stock("HD", (_LATENT,), (r"\bhd\b",), of=("Base",)),
        Stock("Base", (_LATENT,), ("base",)),
    )
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        "dim": ("context_embedder.bias", 0),
        "head": ("transformer_blocks.0.attn.norm_q.weight", 0),
        "hidden": ("transformer_blocks.0.ff.net.0.proj.bias", 0),
        "context": ("context_embedder.weight", 1),
        "inner": (f"{APPROXIMATOR}.in_proj.bias", 0),
        "index": (f"{APPROXIMATOR}.in_proj.weight", 1),
        "patch_in": ("x_embedder.weight", 1),
        "patch_out": ("proj_out.bias", 0),
        "colours": ("img_in_patch.weight", 1),
        "patch": ("img_in_patch.weight", 2),
        "nerf": ("nerf_image_embedder.embedder.0.bias", 0),
        "nerf_in": ("nerf_image_embedder.embedder.0.weight", 1),
        "nerf_rows": ("nerf_blocks.0.param_generator.bias", 0),
        "nerf_linear": ("nerf_final_layer.norm.weight", 0),
        "nerf_conv": ("nerf_final_layer_conv.norm.weight", 0),
    }
    optional = frozenset(measures) - {"dim", "head", "hidden", "context", "inner", "index"}
    group_order = (
        *("double", "single", "img", "txt"),
        *("attention", "q", "k", "v", "out", "ffn", "norm"),
        *("approximator", "embedder", "nerf", "final"),
    )
    precise = frozenset({"norm", "embedder", "approximator", "nerf", "final"})
    lora_signs = (APPROXIMATOR,)  # the rest is also Flux.1's, and loaded alike

    def outputs(self, parts: Iterable[str], layout: str) -> list[tuple[str, tuple[str, ...]]]:
        """Name the stored tensors of ``layout`` in canonical order, each with its parts.

        Raises FamilyError for an incomplete fused one, and for Radiance in diffusers' layout, which has no class for it.
        """
        held = list(parts)
        pixels = next((part for part in held if part.startswith(("img_in_patch.", "nerf_"))), None)
        if layout == "diffusers" and pixels is not None:
            raise FamilyError(
                f'this is Chroma Radiance (tensor "{pixels}"), which diffusers has no class for; leave out `layout=diffusers`.'
            )
        return super().outputs(held, layout)

    def modules_in_comfyui(self, part: str, prefix: str) -> list[str]:
        """See `Family.modules_in_comfyui`; diffusers' names are mapped as far as Flux.1 has them."""
        if prefix in NATIVE or part.split(".")[0] in ("transformer_blocks", "single_transformer_blocks"):
            return super().modules_in_comfyui(part, prefix)
        return super().modules_in_comfyui(part, prefix) if FLUX.table.find(part) else []

    def own_config(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """See `FluxLike.own_config`."""
        return {
            "approximator_hidden_dim": sizes["inner"],
            "approximator_layers": sizes[f"{APPROXIMATOR}.layers"],
            "approximator_num_channels": sizes["index"],
        }


CHROMA = Chroma()

_BLOCKS = {"dim": 3072, "head": 128, "hidden": 12288, "context": 4096, "inner": 5120, "index": 64, f"{APPROXIMATOR}.layers": 5,
           f"{APPROXIMATOR}.norms": 5, "transformer_blocks": 19, "single_transformer_blocks": 38}  # fmt: skip
HD: Mapping[str, int] = CHROMA.derived({**_BLOCKS, "patch_in": 64, "patch_out": 64})
"""The sizes of HD, Base and Flash."""
RADIANCE: Mapping[str, int] = CHROMA.derived(
    {**_BLOCKS, "colours": 3, "patch": 16, "nerf": 64, "nerf_in": 67, "nerf_rows": 49152, "nerf_conv": 64, "nerf_blocks": 4}
)  # fmt: skip
"""The sizes of Radiance, whose last layer is a convolution; older ones have a linear one."""
