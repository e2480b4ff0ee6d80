"""The parts of a pipeline at their embedded size, and a member's folder.

They are built from the classes of the real one.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from mergetool.lab.world import PALETTE, SHAPES, SIZE

CHANNELS = 16
REDUCTION = 4
"""Pixels a side of one latent: a picture is 16 x 16 latents, of which the transformer makes 64 tokens."""

TEXT_WIDTH = 64
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WORDS = ("a", "an", "on", "the", "background", *PALETTE, *SHAPES, "striped", "hollow", "picture", "of", "and", "with")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def transformer() -> ZImageTransformer2DModel:
    """1.8 M parameters: 6 layers and 2 + 2 refiner blocks of width 96, with 3 heads."""
    model = ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=CHANNELS,
        dim=96,
        n_layers=6,
        n_refiner_layers=2,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=TEXT_WIDTH,
        axes_dims=[8, 12, 12],
        axes_lens=[256, 64, 64],
        t_scale=1000.0,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("pad_token"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def vae() -> AutoencoderKL:
    """A quarter of a million parameters; scaling and shift are set once its latents are known."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 24, 32),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def text_encoder(vocabulary: int) -> Qwen3Model:
    """Two layers; the pipeline reads the output of the last but one, so the first one's."""
    return Qwen3Model(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.1,
        )
    )


def tokenizer(folder: Path) -> Qwen2Tokenizer:
    """Byte-level BPE with one token for every word of the world; other text falls to its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {symbol: number for number, symbol in enumerate(_byte_symbols())}
    merges: list[tuple[str, str]] = []
    for word in [f"Ġ{word}" for word in WORDS] + ["user", "assistant", "a"]:
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    for token in SPECIAL:
        vocabulary[token] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = dict.fromkeys(f"{left} {right}" for left, right in merges)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
    made = Qwen2Tokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.chat_template = CHAT_TEMPLATE
    made.model_max_length = 512
    return made


def _byte_symbols() -> list[str]:
    """The 256 printable characters that stand for bytes in GPT-2's and Qwen's vocabularies, in byte order."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in kept else chr(next(spare)) for byte in range(256)]


def save(folder: Path, pipeline: ZImagePipeline) -> None:
    """Write a member as a pipeline folder in BF16, whole or not at all."""
    staged = folder.with_name(folder.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    pipeline.to(torch.bfloat16).save_pretrained(staged)
    for path in staged.rglob("*.json"):  # where a member was loaded from is nobody's business
        stored = json.loads(path.read_text())
        if stored.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(stored, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    staged.rename(folder)


def scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift, use_dynamic_shifting=False)
