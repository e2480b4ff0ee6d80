"""UNets of Stable Diffusion: their rows, block weights, and the spellings of their LoRAs.

Each family puts the rows together with its own widths. Canonical names are those of diffusers' ``UNet2DConditionModel``. The ComfyUI layout is that of the first releases (ldm, sgm), which numbers along the whole path
what diffusers numbers within each resolution: ``input_blocks.4.1`` is ``down_blocks.1.attentions.0``. Nothing is fused in either.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from mergetool.arch.anatomy import NATIVE, InputEmbedder, Preset
from mergetool.arch.families.block_weights import curves
from mergetool.arch.known import KnownFamily, Like, Signature
from mergetool.arch.signs import Stock, Variant
from mergetool.arch.table import Named


def block_weights(blocks: int) -> tuple[Preset, ...]:
    """List the presets of a UNet of so many blocks on either way.

    They choose groups or run over depth, or are the curves of block-weight tools.
    """
    return (
        Preset("input-only", ("*=0", "input_blocks=1")),
        Preset("output-only", ("*=0", "output_blocks=1")),
        Preset("attention-only", ("*=0", "attention=1")),
        Preset("resnet-only", ("*=0", "resnet=1")),
        Preset("early-blocks", ("*=0", "input_blocks=linear(1,1/2)", "M00=1/2", "output_blocks=linear(1/2,0)")),
        Preset("late-blocks", ("*=0", "input_blocks=linear(0,1/2)", "M00=1/2", "output_blocks=linear(1/2,1)")),
        *curves(blocks),
    )


STACKS = ("input_blocks", "middle_block", "output_blocks")


CROSS_ATTENTION = tuple(f"attn2.{inner}to_{letter}" for inner in ("", "processor.") for letter in "kv")
"""Ends of the modules whose columns are those of the prompt, in either spelling."""


CONTEXTUAL = "transformer_blocks.0.attn2.to_k"
"""The module of a transformer whose columns tell what prompt it reads."""


def _attention(name: str, columns: int | str, width: str) -> Named:
    inside = (
        Named("to_q", groups=("q",), shape=(width, width)),
        Named("to_k", groups=("k",), shape=(width, columns)),
        Named("to_v", groups=("v",), shape=(width, columns)),
        Named("to_out.0", groups=("out",), shape=(width, width), bias=True),
    )
    return Named(name, groups=("attention", name), inside=inside)


def transformer(name: str, comfyui: str, stack: str, width: str, context: int, kernel: tuple[int, ...]) -> Named:
    """The rows of a transformer, whose names differ between layouts in their place only.

    What stands before and behind the blocks is a matrix, or a convolution with a ``kernel`` of 1 x 1. The first matrix of a feed-forward has its values' rows and its gates'.
    """
    block = (
        Named("norm1", groups=("norm",), shape=(width,), bias=True),
        _attention("attn1", width, width),
        Named("norm2", groups=("norm",), shape=(width,), bias=True),
        _attention("attn2", context, width),
        Named("norm3", groups=("norm",), shape=(width,), bias=True),
        Named("ff.net.0.proj", groups=("ffn",), shape=(f"8*{width}", width), bias=True),
        Named("ff.net.2", groups=("ffn",), shape=(width, f"4*{width}"), bias=True),
    )
    inside = (
        Named("norm", groups=("norm",), shape=(width,), bias=True),
        Named("proj_in", groups=("proj",), shape=(width, width, *kernel), bias=True),
        Named("transformer_blocks.{i}", inside=block),
        Named("proj_out", groups=("proj",), shape=(width, width, *kernel), bias=True),
    )
    return Named(name, comfyui, (stack,), inside)


def resnet(name: str, comfyui: str, stack: str, columns: str, rows: str) -> Named:
    """A residual block. Where it changes the number of channels it has a shortcut."""
    inside = (
        Named("norm1", "in_layers.0", ("norm",), shape=(columns,), bias=True),
        Named("conv1", "in_layers.2", shape=(rows, columns, 3, 3), bias=True),
        Named("time_emb_proj", "emb_layers.1", shape=(rows, "4*width0"), bias=True),
        Named("norm2", "out_layers.0", ("norm",), shape=(rows,), bias=True),
        Named("conv2", "out_layers.3", shape=(rows, rows, 3, 3), bias=True),
        Named("conv_shortcut", "skip_connection", shape=None if rows == columns else (rows, columns, 1, 1), bias=True),
    )
    return Named(name, comfyui, (stack, "resnet"), inside)


def encoder(
    widths: Sequence[str], attended: Sequence[bool], context: int, kernel: tuple[int, ...] = ()
) -> Iterator[Named]:
    """The rows from the first convolution to the middle. See `way`."""
    yield Named("conv_in", "input_blocks.0.0", ("input_blocks", "conv_in"), shape=("width0", "input", 3, 3), bias=True)
    stack, last = "input_blocks", len(widths) - 1
    for level, width in enumerate(widths):
        own, n = f"down_blocks.{level}", 3 * level + 1
        for i, columns in enumerate((widths[max(0, level - 1)], width)):
            yield resnet(f"{own}.resnets.{i}", f"{stack}.{n + i}.0", stack, columns, width)
            if attended[level]:
                yield transformer(f"{own}.attentions.{i}", f"{stack}.{n + i}.1", stack, width, context, kernel)
        if level < last:
            yield _resized(f"{own}.downsamplers.0.conv", f"{stack}.{n + 2}.0.op", stack, width)
    width = widths[-1]
    yield resnet("mid_block.resnets.0", "middle_block.0", "middle_block", width, width)
    yield transformer("mid_block.attentions.0", "middle_block.1", "middle_block", width, context, kernel)
    yield resnet("mid_block.resnets.1", "middle_block.2", "middle_block", width, width)


def kept(widths: Sequence[str]) -> list[str]:
    """The channels that every block on the way down hands to the way up, in their order."""
    last = len(widths) - 1
    blocks = [[width] * (3 if level < last else 2) for level, width in enumerate(widths)]
    return ["width0", *(width for level in blocks for width in level)]


def way(widths: Sequence[str], attended: Sequence[bool], context: int, kernel: tuple[int, ...] = ()) -> Iterator[Named]:
    """The rows from the first convolution to the last block of the way up.

    ``widths`` are the channels of each resolution, the full one first, each with two residual blocks on the way down and three on the way up; ``attended`` says
    which have transformers beside them.
    """
    yield from encoder(widths, attended, context, kernel)
    stack, came, last, handed = "output_blocks", widths[-1], len(widths) - 1, kept(widths)
    for up, level in enumerate(reversed(range(len(widths)))):
        own, n, width = f"up_blocks.{up}", 3 * up, widths[level]
        for i in range(3):
            yield resnet(f"{own}.resnets.{i}", f"{stack}.{n + i}.0", stack, _joined(came, handed.pop()), width)
            came = width
            if attended[level]:
                yield transformer(f"{own}.attentions.{i}", f"{stack}.{n + i}.1", stack, width, context, kernel)
        if up < last:
            place = 2 if attended[level] else 1
            yield _resized(f"{own}.upsamplers.0.conv", f"{stack}.{n + 2}.{place}.conv", stack, width)


def _resized(name: str, comfyui: str, stack: str, width: str) -> Named:
    return Named(name, comfyui, (stack, "resnet"), shape=(width, width, 3, 3), bias=True)


def _joined(came: str, kept: str) -> str:
    """The channels of what came last and of what the way down had there, one behind the other."""
    return f"2*{came}" if came == kept else f"{came}+{kept}"


def embedders(*others: Named) -> tuple[Named, ...]:
    """The embedder of time, and others."""
    return (
        Named("time_embedding.linear_1", "time_embed.0", ("embedder",), shape=("4*width0", "width0"), bias=True),
        Named("time_embedding.linear_2", "time_embed.2", ("embedder",), shape=("4*width0", "4*width0"), bias=True),
        *others,
    )


def rows(
    widths: Sequence[str],
    attended: Sequence[bool],
    context: int,
    kernel: tuple[int, ...] = (),
    others: Sequence[Named] = (),
) -> tuple[Named, ...]:
    """All rows of a UNet: the embedder of time and ``others``, its `way`, and the end."""
    return (
        *embedders(*others),
        *way(widths, attended, context, kernel),
        Named("conv_norm_out", "out.0", ("final", "norm"), shape=("width0",), bias=True),
        Named("conv_out", "out.2", ("final",), shape=("output", "width0", 3, 3), bias=True),
    )


def measures(widths: Sequence[str]) -> Mapping[str, tuple[str, int]]:
    """A norm shows the width of each resolution, two convolutions show the channels."""
    norms = {
        width: (f"down_blocks.{level}.resnets.0.norm2.weight", 0) for level, width in enumerate(dict.fromkeys(widths))
    }
    return {**norms, "input": ("conv_in.weight", 1), "output": ("conv_out.bias", 0)}


KERNEL_3: Like = (None, None, 3, 3)


def signatures(signs: Mapping[tuple[str, str], Like], lacks: Collection[str] = ()) -> tuple[Signature, ...]:
    """Make the signatures of a UNet, whose ``signs`` go by their names in both layouts.

    Every one also has the first convolution and the last.
    """
    return in_layouts({("input_blocks.0.0", "conv_in"): KERNEL_3, ("out.2", "conv_out"): KERNEL_3, **signs}, lacks)


def in_layouts(has: Mapping[tuple[str, str], Like], lacks: Collection[str] = ()) -> tuple[Signature, ...]:
    """The signatures of modules that go by their names in both layouts."""
    return tuple(
        Signature(layout, {f"{names[i]}.weight": like for names, like in has.items()}, dict.fromkeys(lacks))
        for i, layout in enumerate(UNet.layouts)
    )


def conditioned(base: str) -> tuple[Stock, ...]:
    """List the stock models that read more than the picture, trained from ``base``."""
    rows = (("inpainting", "inpaint"), ("InstructPix2Pix", "pix2pix"))
    return tuple(Stock(name, (name,), (word,), of=(base,)) for name, word in rows)


class UNet(KnownFamily):
    """A UNet of Stable Diffusion."""

    group_order: tuple[str, ...] = (
        *STACKS,
        *("attention", "attn1", "attn2", "q", "k", "v", "out", "ffn", "proj", "resnet", "norm"),
        *("embedder", "conv_in", "final"),
    )
    quantised = frozenset({"attention", "ffn", "proj"})
    precise = frozenset({"norm", "embedder", "resnet", "conv_in", "final"})
    quantised_layout: str | None = (
        "comfyui"  # of diffusers' layout ComfyUI renames weights and biases, and loses scales
    )

    variants: tuple[Variant, ...] = (
        Variant("inpainting", {"conv_in.weight": (None, 9, 3, 3)}),
        Variant("InstructPix2Pix", {"conv_in.weight": (None, 8, 3, 3)}),
    )
    input_embedder: InputEmbedder | None = InputEmbedder("conv_in.weight", "conv_out.weight")
    component = "unet"
    lora_prefix = "lora_unet_"  # before ComfyUI's names: of diffusers' it does not know PEFT's of attentions
    lora_alphas = False  # of several diffusers gives attentions the commonest
    in_comfyui = frozenset({"lora_unet_", "lycoris_", "unet.", ""})
    lora_signs: tuple[str | tuple[str, ...], ...] = (
        *(*STACKS, "down_blocks", "mid_block", "up_blocks"),
        *("time_embed", "label_emb", "add_embedding", "conv_in", "conv_out"),
    )

    def aliases(self, parts: Collection[str]) -> dict[str, tuple[str, ...]]:
        """Projections of attentions in diffusers' older spellings.

        They stand behind ``processor``, and ``to_out`` has no number.
        """
        names: dict[str, tuple[str, ...]] = {}
        for part in parts:
            module = part.removesuffix(".weight")
            if ".to_" in module and module != part:
                for name in (module, module.removesuffix(".0")):
                    names |= {name: (part,), name.replace(".to_", ".processor.to_"): (part,)}
        return names

    def modules_in_comfyui(self, part: str, prefix: str) -> list[str]:
        """ComfyUI's own names of a module, and diffusers'.

        Where those have dots, it knows attentions in the older spelling alone.
        """
        names = [self.stored_name(part, "comfyui")] if prefix in NATIVE else []
        if prefix in ("unet.", ""):
            module, dot, leaf = part.rpartition(".")
            old = module.replace(".to_", ".processor.to_")
            return [*names, f"{old.removesuffix('.0') if old.endswith('.to_out.0') else old}{dot}{leaf}"]
        return [*names, part] if prefix in self.in_comfyui else names

    def block_of(self, part: str) -> tuple[str, int] | None:
        """The block as ComfyUI and block-weight tools number it.

        Example: ``down_blocks.1.attentions.0`` is ``input_blocks.4``.
        """
        stack = self.groups(part, ()) & set(STACKS)
        return super().block_of(self.stored_name(part, "comfyui")) if stack else None

    def block_name(self, part: str) -> str:
        """The weight of a part in block-weight tools: ``IN00`` to ``OUT11``, or ``BASE``.

        ``M00`` is all of the middle, ``BASE`` whatever is in no block.
        """
        block = self.block_of(part)
        if block is None:
            return "BASE"
        stack, number = block
        return "M00" if stack == "middle_block" else f"{'IN' if stack == 'input_blocks' else 'OUT'}{number:02}"

    def derived(self, sizes: dict[str, int]) -> dict[str, int]:
        """The channels of two resolutions together."""
        joined = {str(size) for spot in self.table.spots for size in spot.named.shape or () if "+" in str(size)}
        return {name: sum(sizes[width] for width in name.split("+")) for name in joined} | sizes
