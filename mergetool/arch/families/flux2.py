"""Flux.2 (dev, Klein 4B and 9B): Flux.1's blocks, unbiased, with three modulations.

Canonical names are those of diffusers' ``Flux2Transformer2DModel``, with one difference: of a single block's first matrix, which both layouts store as one, q, k, v
and the gated feed-forward are parts of their own, as those of Flux.1 are. Black Forest Labs' layout, which ComfyUI has, also stores the double blocks' q, k and v
as one, and the final modulation as (shift, scale) where diffusers has (scale, shift).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from mergetool.arch.anatomy import NATIVE
from mergetool.arch.families.flux_like import CONTROLNET, FluxLike
from mergetool.arch.known import Signature, Variant
from mergetool.arch.sampling import SamplingDefaults
from mergetool.arch.signs import Stock
from mergetool.arch.table import Named

_STREAMS = (("img", "", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
            ("txt", "added_", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"))  # fmt: skip
_DOUBLE = tuple(
    row
    for stream, added, projections, out, ff in _STREAMS
    for row in (
        *(
            Named(f"attn.{name}", f"{stream}_attn.qkv[{i}]", (stream, "attention", "qkv"[i]), shape=("dim", "dim"))
            for i, name in enumerate(projections)
        ),
        *(
            Named(f"attn.norm_{added}{x}.weight", f"{stream}_attn.norm.{word}_norm.scale", (stream, "attention", "norm"), shape=("head",))
            for x, word in (("q", "query"), ("k", "key"))
        ),
        Named(f"attn.{out}", f"{stream}_attn.proj", (stream, "attention", "out"), shape=("dim", "dim")),
        Named(f"{ff}.linear_in", f"{stream}_mlp.0", (stream, "ffn"), shape=("2*hidden", "dim")),
        Named(f"{ff}.linear_out", f"{stream}_mlp.2", (stream, "ffn"), shape=("dim", "hidden")),
    )
)  # fmt: skip
_FUSED = "attn.to_qkv_mlp_proj"
_SINGLE = (
    *(
        Named(f"attn.to_{x}", f"linear1[{i}]", ("attention", x), diffusers=f"{_FUSED}[{i}]", shape=("dim", "dim"), rows="=")
        for i, x in enumerate("qkv")
    ),
    Named("proj_mlp", "linear1[3]", ("ffn",), diffusers=f"{_FUSED}[3]", shape=("2*hidden", "dim"), rows="6*="),
    Named("attn.norm_q.weight", "norm.query_norm.scale", ("attention", "norm"), shape=("head",)),
    Named("attn.norm_k.weight", "norm.key_norm.scale", ("attention", "norm"), shape=("head",)),
    Named("attn.to_out", "linear2", ("attention", "out", "ffn"), shape=("dim", "both")),
)  # fmt: skip
_EMBEDDERS = (("timestep_embedder", "time_in", "dim"), ("guidance_embedder", "guidance_in", "guidance"))
_UNMAPPED = (
    "time_guidance_embed",
    "double_stream_modulation_img",
    "double_stream_modulation_txt",
    "single_stream_modulation",
)
_DEPTHS = range(38, 48)
"""Single blocks whose numbers Flux.1 has not."""


class Flux2(FluxLike):
    """Flux.2 of any width and depth.

    Groups overlap, and mean what they mean of Flux.1, with one difference: ``modulation`` is that of all blocks at once, three matrices, and of the final
    layer.
    """

    name = "Flux.2"
    model = "Flux2Transformer2DModel"
    axes: ClassVar[Mapping[int, tuple[int, ...]]] = {128: (32, 32, 32, 32), 16: (4, 4, 4, 4)}
    names = (
        *(
            Named(f"time_guidance_embed.{theirs}.linear_{n}", f"{ours}.{way}_layer", ("embedder",), shape=(width, 256 if n == 1 else width))
            for theirs, ours, width in _EMBEDDERS for n, way in ((1, "in"), (2, "out"))
        ),
        Named("double_stream_modulation_img.linear", "double_stream_modulation_img.lin", ("img", "modulation"), shape=("6*dim", "dim")),
        Named("double_stream_modulation_txt.linear", "double_stream_modulation_txt.lin", ("txt", "modulation"), shape=("6*dim", "dim")),
        Named("single_stream_modulation.linear", "single_stream_modulation.lin", ("modulation",), shape=("3*dim", "dim")),
        Named("x_embedder", "img_in", ("img", "embedder"), shape=("dim", "patch_in")),
        Named("context_embedder", "txt_in", ("txt", "embedder"), shape=("dim", "context")),
        Named("transformer_blocks.{i}", "double_blocks.{i}", ("double",), inside=_DOUBLE),
        Named("single_transformer_blocks.{i}", "single_blocks.{i}", ("single",), inside=_SINGLE),
        Named("norm_out.linear.scale", "final_layer.adaLN_modulation.1[1]", ("final", "modulation"), diffusers="norm_out.linear[0]",
              shape=("dim", "dim")),
        Named("norm_out.linear.shift", "final_layer.adaLN_modulation.1[0]", ("final", "modulation"), diffusers="norm_out.linear[1]",
              shape=("dim", "dim")),
        Named("proj_out", "final_layer.linear", ("final",), shape=("patch_out", "dim")),
    )  # fmt: skip
    signatures = (
        Signature(
            "comfyui",
            has=dict.fromkeys(
                ("double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.norm.key_norm.scale", "img_in.weight")
            ),
            lacks=CONTROLNET,
        ),
        Signature(
            "diffusers",
            has=dict.fromkeys(
                ("double_stream_modulation_img.linear.weight", f"single_transformer_blocks.0.{_FUSED}.weight", "x_embedder.weight")
            ),
            lacks=CONTROLNET,
        ),
    )  # fmt: skip
    variants = tuple(
        Variant(name, has={"context_embedder.weight": (None, context)})
        for name, context in (("dev", 15360), ("Klein 9B", 12288), ("Klein 4B", 7680))
    )
    stock = (
        Stock("dev", ("dev",), (r"\bdev\b",), distilled=True),
        *(Stock(f"{size} Base", (size,), ("base",)) for size in ("Klein 9B", "Klein 4B")),
        *(Stock(size, (size,), ("klein",), of=(f"{size} Base",), distilled=True) for size in ("Klein 9B", "Klein 4B")),
    )
    measures: ClassVar[Mapping[str, tuple[str, int]]] = {
        "dim": ("x_embedder.weight", 0),
        "head": ("transformer_blocks.0.attn.norm_q.weight", 0),
        "hidden": ("transformer_blocks.0.ff.linear_out.weight", 1),
        "patch_in": ("x_embedder.weight", 1),
        "patch_out": ("proj_out.weight", 0),
        "context": ("context_embedder.weight", 1),
        "guidance": ("time_guidance_embed.guidance_embedder.linear_1.weight", 0),
    }
    optional = frozenset({"guidance"})
    precise = frozenset({"norm", "embedder", "modulation", "final"})
    sampling = (
        SamplingDefaults("Flux2", 50, "distilled", 4.0),
        SamplingDefaults(
            "Flux2Klein", 4, "none", name="Klein, distilled", signs={"is_distilled": True}, source="the model's card"
        ),
        SamplingDefaults("Flux2Klein", 50, "cfg", 4.0, name="Klein, base"),
    )
    loader = "Flux2LoraLoaderMixin"
    lora_signs = (
        *("to_qkv_mlp_proj", "stream_modulation", "time_guidance_embed", ".linear_in", ".linear_out"),
        *(f"{stack}{dot}{i}{dot}" for stack in ("single_blocks", "single_transformer_blocks") for i in _DEPTHS for dot in "._"),
    )  # fmt: skip
    other_names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "single_blocks.{i}.linear1_qkv": tuple(f"single_transformer_blocks.{{i}}.attn.to_{x}.weight" for x in "qkv"),
    }

    def modules_in_comfyui(self, part: str, prefix: str) -> list[str]:
        """See `Family.modules_in_comfyui`; some of diffusers' names are not mapped."""
        return [] if prefix not in NATIVE and part.startswith(_UNMAPPED) else super().modules_in_comfyui(part, prefix)

    def own_config(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        """See `FluxLike.own_config`."""
        return {"guidance_embeds": "guidance" in sizes, "mlp_ratio": sizes["hidden"] / sizes["dim"]}


FLUX2 = Flux2()


def _published(dim: int, context: int, double: int, single: int, **more: int) -> Mapping[str, int]:
    sizes = {"dim": dim, "head": 128, "hidden": 3 * dim, "patch_in": 128, "patch_out": 128, "context": context}
    return FLUX2.derived({**sizes, "transformer_blocks": double, "single_transformer_blocks": single, **more})


DEV = _published(6144, 15360, 8, 48, guidance=6144)
KLEIN_9B = _published(4096, 12288, 8, 24)
KLEIN_4B = _published(3072, 7680, 5, 20)
"""The sizes of the published ones: only dev has guidance."""
