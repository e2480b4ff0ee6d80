"""The tensors of the text encoder and the VAE, by name and shape, from their configs.

Qwen3 as transformers has it (Qwen3Model), AutoencoderKL as diffusers has it; the names of other programs are put into theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergetool.errors import DataError

IGNORED = frozenset({"lm_head.weight", "rotary_emb.inv_freq", "rope_freqs.weight"})
"""Tensors in files of a text encoder that nothing reads: the head of the whole language model, tables that are computed."""

ComponentShapes = dict[str, tuple[int, ...]]

# llama.cpp's names in a GGUF, component by component; q and k of Qwen3 are stored as they are.
_LLAMA_CPP = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "blk": "layers",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def qwen3_name(stored: str) -> str:
    """transformers' name of a text encoder's tensor.

    The stored name is transformers', with or without ``model.``, or llama.cpp's.
    """
    if stored.startswith(("blk.", "token_embd.", "output_norm.", "output.")):
        return ".".join(_LLAMA_CPP.get(component, component) for component in stored.split("."))
    return stored.removeprefix("model.")


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without trailing ones. Single files store a matrix of attention as a convolution of 1 x 1."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@dataclass(frozen=True, slots=True)
class Qwen3:
    """The sizes of a Qwen3 text encoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    attention_bias: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], path: str) -> Qwen3:
        """Raises DataError for the config of something else."""
        kind = config.get("model_type")
        if kind != "qwen3":
            raise DataError(
                f'"{path}" is not a readable text encoder: its config.json is of {_said(kind)}, not of qwen3; '
                "name the model's own with `text_encoder`."
            )
        return cls(
            hidden_size=_size(config, "hidden_size", path),
            intermediate_size=_size(config, "intermediate_size", path),
            num_hidden_layers=_size(config, "num_hidden_layers", path),
            num_attention_heads=_size(config, "num_attention_heads", path),
            num_key_value_heads=_size(config, "num_key_value_heads", path),
            head_dim=_size(config, "head_dim", path, 128),
            vocab_size=_size(config, "vocab_size", path),
            attention_bias=bool(config.get("attention_bias")),
        )

    def shapes(self) -> ComponentShapes:
        """Every tensor of transformers' Qwen3Model."""
        width, q, kv = (
            self.hidden_size,
            *(n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads)),
        )
        matrices = {"q_proj": (q, width), "k_proj": (kv, width), "v_proj": (kv, width), "o_proj": (width, q)}
        layer: ComponentShapes = {f"self_attn.{name}.weight": shape for name, shape in matrices.items()}
        if self.attention_bias:
            layer |= {f"self_attn.{name}.bias": shape[:1] for name, shape in matrices.items()}
        layer |= {f"self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        layer |= {f"mlp.{name}_proj.weight": (self.intermediate_size, width) for name in ("gate", "up")}
        layer |= {"mlp.down_proj.weight": (width, self.intermediate_size)}
        layer |= {f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        whole: ComponentShapes = {"embed_tokens.weight": (self.vocab_size, width), "norm.weight": (width,)}
        return whole | {f"layers.{i}.{name}": s for i in range(self.num_hidden_layers) for name, s in layer.items()}


@dataclass(frozen=True, slots=True)
class Vae:
    """The sizes of an AutoencoderKL."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    sample_size: int
    quant_conv: bool
    post_quant_conv: bool
    attention: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], path: str) -> Vae:
        """Raises DataError for the config of something else, a tiny autoencoder among them."""
        kind = config.get("_class_name")
        if kind != "AutoencoderKL":
            tiny = kind == "AutoencoderTiny"
            raise DataError(
                f'"{path}" is not a readable VAE: its config.json is of {_said(kind)}, not of AutoencoderKL; '
                f"{'a tiny autoencoder makes previews only: ' if tiny else ''}name the model's own with `vae`."
            )
        widths = config.get("block_out_channels")
        if not isinstance(widths, list) or not 0 < len(widths) < 10 or not all(map(_is_size, widths)):
            raise DataError(f'"{path}" is not a readable VAE: its config.json has no block_out_channels.')
        return cls(
            in_channels=_size(config, "in_channels", path),
            out_channels=_size(config, "out_channels", path),
            latent_channels=_size(config, "latent_channels", path),
            block_out_channels=tuple(widths),
            layers_per_block=_size(config, "layers_per_block", path, 1),
            sample_size=_size(config, "sample_size", path, 1024),
            quant_conv=config.get("use_quant_conv", True) is not False,
            post_quant_conv=config.get("use_post_quant_conv", True) is not False,
            attention=config.get("mid_block_add_attention", True) is not False,
        )

    @property
    def reduction(self) -> int:
        """Pixels a side of one latent."""
        return int(2 ** (len(self.block_out_channels) - 1))

    def shapes(self) -> ComponentShapes:
        """Every tensor of diffusers' AutoencoderKL."""
        widths, latent = self.block_out_channels, self.latent_channels
        shapes: ComponentShapes = {}
        shapes |= _convolution("encoder.conv_in", self.in_channels, widths[0])
        shapes |= self._blocks("encoder.down_blocks", widths, self.layers_per_block, "downsamplers")
        shapes |= self._ends("encoder", widths[-1], widths[-1], 2 * latent)
        shapes |= _convolution("decoder.conv_in", latent, widths[-1])
        shapes |= self._blocks("decoder.up_blocks", widths[::-1], self.layers_per_block + 1, "upsamplers")
        shapes |= self._ends("decoder", widths[-1], widths[0], self.out_channels)
        if self.quant_conv:
            shapes |= _convolution("quant_conv", 2 * latent, 2 * latent, 1)
        if self.post_quant_conv:
            shapes |= _convolution("post_quant_conv", latent, latent, 1)
        return shapes

    def _blocks(self, name: str, widths: tuple[int, ...], layers: int, sampler: str) -> ComponentShapes:
        shapes: ComponentShapes = {}
        before = widths[0]
        for i, width in enumerate(widths):
            for layer in range(layers):
                shapes |= _residual(f"{name}.{i}.resnets.{layer}", before, width)
                before = width
            if i < len(widths) - 1:
                shapes |= _convolution(f"{name}.{i}.{sampler}.0.conv", width, width)
        return shapes

    def _ends(self, half: str, middle: int, last: int, out: int) -> ComponentShapes:
        shapes = _residual(f"{half}.mid_block.resnets.0", middle, middle) | _residual(
            f"{half}.mid_block.resnets.1", middle, middle
        )
        if self.attention:
            at = f"{half}.mid_block.attentions.0"
            shapes |= _norm(f"{at}.group_norm", middle)
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= {f"{at}.{name}.weight": (middle, middle), f"{at}.{name}.bias": (middle,)}
        return shapes | _norm(f"{half}.conv_norm_out", last) | _convolution(f"{half}.conv_out", last, out)

    def name(self, stored: str) -> str:
        """diffusers' name of a VAE's tensor.

        The stored name is diffusers' or latent diffusion's (``ae.safetensors``), with or without ``vae.``.
        """
        name = re.sub(r"^(vae|first_stage_model)\.", "", stored)
        for pattern, replacement in _LATENT_DIFFUSION:
            name = re.sub(pattern, replacement, name)
        # Latent diffusion numbers the decoder's blocks from the picture, diffusers from the latents.
        return re.sub(
            r"^decoder\.up\.(\d+)\.",
            lambda match: f"decoder.up_blocks.{len(self.block_out_channels) - 1 - int(match[1])}.",
            name,
        )


_LATENT_DIFFUSION = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"^(encoder|decoder)\.norm_out\.", r"\1.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^(encoder\.down|decoder\.up)\.(\d+)\.block\.", r"\1.\2.resnets."),
    (r"^(encoder\.down|decoder\.up)\.(\d+)\.(down|up)sample\.", r"\1.\2.\3samplers.0."),
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
)


def _convolution(name: str, before: int, width: int, side: int = 3) -> ComponentShapes:
    return {f"{name}.weight": (width, before, side, side), f"{name}.bias": (width,)}


def _norm(name: str, width: int) -> ComponentShapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _residual(name: str, before: int, width: int) -> ComponentShapes:
    shapes = _norm(f"{name}.norm1", before) | _convolution(f"{name}.conv1", before, width)
    shapes |= _norm(f"{name}.norm2", width) | _convolution(f"{name}.conv2", width, width)
    return shapes if before == width else shapes | _convolution(f"{name}.conv_shortcut", before, width, 1)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 10**7


def _size(config: Mapping[str, Any], name: str, path: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if not _is_size(value):
        raise DataError(f'"{path}": its config.json has no {name} that is a number of 1 or more.')
    assert isinstance(value, int)
    return value


def _said(kind: object) -> str:
    return f'"{kind[:60]}"' if isinstance(kind, str) else "no known kind"
