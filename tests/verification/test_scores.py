"""The CLIP score is the cosine of the two embeddings that CLIP itself gives."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from mergetool.errors import DataError, InputMissing
from mergetool.verification.scores import clip_scorer


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two thin layers with random weights, saved as transformers saves one."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    words = ["a", "red", "blue", "circle"]
    vocabulary = {
        token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in words)])
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = layer | {"vocab_size": len(vocabulary), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=layer | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    ).save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_the_score_is_the_cosine_of_clips_embeddings(clip: Path) -> None:
    pictures = [np.full((32, 32, 3), level, np.uint8) for level in (20, 200)]
    prompts = ["a red circle", "a blue circle"]
    found = clip_scorer(clip)(pictures, prompts)
    model = CLIPModel.from_pretrained(clip)
    tokenizer, processor = CLIPTokenizer.from_pretrained(clip), CLIPImageProcessor.from_pretrained(clip)
    for picture, prompt, score in zip(pictures, prompts, found, strict=True):
        inputs = tokenizer([prompt], return_tensors="pt") | processor([picture], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        image, text = (e[0].double().numpy() for e in (outputs.image_embeds, outputs.text_embeds))
        assert score == pytest.approx(image @ text / np.linalg.norm(image) / np.linalg.norm(text), abs=1e-6)


def test_a_folder_without_a_clip_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="is no folder"):
        clip_scorer(tmp_path / "nothing")
    with pytest.raises(DataError, match="not a readable CLIP model"):
        clip_scorer(tmp_path)
