"""Text encoders and VAEs that are not whole, hold something else, or make NaN."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from mergetool import models
from mergetool.errors import DataError, NonFiniteError, UsageError
from mergetool.sampler.architectures import Qwen3, Vae
from mergetool.sampler.load import load_text_encoder, load_transformer
from mergetool.sampler.parts import CONFIGS, Components, config_of
from mergetool.sampler.request import Shot, Stage
from mergetool.sampler.studio import Studio

LAB = models.EMBEDDED / "base"
SHOT = Shot("a blue circle on a gold background")


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A copy of an embedded pipeline, to be spoilt."""
    shutil.copytree(LAB, tmp_path / "pipeline")
    return tmp_path / "pipeline"


def weights_of(folder: Path) -> Path:
    (found,) = folder.glob("*.safetensors")
    return found


@pytest.mark.parametrize("folder", [LAB / "vae", CONFIGS / "vae"], ids=["embedded", "real"])
def test_the_vaes_tensors_are_those_of_diffusers(folder: Path) -> None:
    with torch.device("meta"):
        theirs = AutoencoderKL.from_config(AutoencoderKL.load_config(folder)).state_dict()
    found = Vae.of(config_of(folder, "vae"), "x").shapes()
    assert found == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("folder", [LAB / "text_encoder", CONFIGS / "text_encoder"], ids=["embedded", "real"])
def test_the_text_encoders_tensors_are_those_of_transformers(folder: Path) -> None:
    with torch.device("meta"):
        theirs = AutoModel.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    found = Qwen3.of(config_of(folder, "text_encoder"), "x").shapes()
    assert found == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_every_tensor_is_needed(pipeline: Path, part: str) -> None:
    path = weights_of(pipeline / part)
    whole = load_file(path)
    for name in sorted(whole)[:: max(1, len(whole) // 12)]:
        save_file({key: value for key, value in whole.items() if key != name}, path)
        with pytest.raises(DataError, match=rf'lacks "{name}", which its config asks for'):
            Components.find(str(pipeline)).check()


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_an_unknown_tensor_is_refused(pipeline: Path, part: str) -> None:
    path = weights_of(pipeline / part)
    save_file({**load_file(path), "other.weight": torch.zeros(2)}, path)
    with pytest.raises(DataError, match=r'has "other\.weight", which its config does not know'):
        Components.find(str(pipeline)).check()


def test_a_text_encoder_under_other_names_is_refused(pipeline: Path) -> None:
    path = weights_of(pipeline / "text_encoder")
    save_file({f"language_model.{name}": tensor for name, tensor in load_file(path).items()}, path)
    with pytest.raises(DataError, match=r'it has "language_model\.embed_tokens\.weight", which is not known'):
        Components.find(str(pipeline)).check()


def test_the_head_of_the_language_model_is_left_unread(pipeline: Path) -> None:
    path = weights_of(pipeline / "text_encoder")
    save_file({**load_file(path), "lm_head.weight": torch.zeros(370, 64)}, path)
    Components.find(str(pipeline)).check()


def test_a_tensor_of_another_shape_is_refused(pipeline: Path) -> None:
    path = weights_of(pipeline / "vae")
    save_file({**load_file(path), "decoder.conv_in.bias": torch.zeros(5)}, path)
    with pytest.raises(DataError, match=r'"decoder\.conv_in\.bias" of the VAE .* is \[5\], its config asks for \[32\]'):
        Components.find(str(pipeline)).check()


def test_a_tiny_autoencoder_is_refused_as_one(pipeline: Path, tmp_path: Path) -> None:
    AutoencoderTiny(latent_channels=16).save_pretrained(tmp_path / "tiny")
    save_file({"decoder.layers.0.weight": torch.zeros(64, 16, 3, 3)}, tmp_path / "taef1.safetensors")
    for place in (tmp_path / "tiny", tmp_path / "taef1.safetensors"):
        with pytest.raises(DataError, match="tiny autoencoder"):
            Components.find(str(pipeline), vae=place).check()


def test_a_gguf_text_encoder_is_read_by_llama_cpps_names(tmp_path: Path) -> None:
    weights = load_file(weights_of(LAB / "text_encoder"))
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "layers": "blk", "self_attn": None, "mlp": None,
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k",
             "v_proj": "attn_v", "o_proj": "attn_output", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    writer = gguf.GGUFWriter(tmp_path / "qwen.gguf", "qwen3")
    for name, tensor in weights.items():
        components = (names.get(component, component) for component in name.split("."))
        writer.add_tensor(".".join(filter(None, components)), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shutil.copy(LAB / "text_encoder" / "config.json", tmp_path)
    parts = Components(tmp_path / "qwen.gguf", LAB / "tokenizer", LAB / "vae")
    found = load_text_encoder(parts, dtype=torch.float32)[0].state_dict()
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in weights.items())


def test_nan_of_the_text_encoder_is_told_as_its_own(pipeline: Path) -> None:
    path = weights_of(pipeline / "text_encoder")
    weights = load_file(path)
    weights["layers.0.mlp.down_proj.weight"][0] = torch.nan
    save_file(weights, path)
    with pytest.raises(NonFiniteError, match=r"the text encoder .* makes NaN or infinity"):
        Studio(Components.find(str(pipeline))).captions([SHOT.prompt])


def test_nan_of_the_transformer_is_told_with_the_step(pipeline: Path) -> None:
    path = weights_of(pipeline / "transformer")
    weights = load_file(path)
    weights["layers.2.feed_forward.w2.weight"][0] = torch.nan
    save_file(weights, path)
    with pytest.raises(NonFiniteError, match=r"predicts NaN or infinity at step 1 of 3 \(sigma 1\.000\)"):
        Studio(Components.find("lab.base")).first_stage(Stage(str(pipeline), steps=3), [SHOT], (64, 64))


@pytest.mark.parametrize(("bias", "words"), [(torch.nan, "makes NaN or infinity"), (-1e4, "makes a black picture")])
def test_nan_and_black_pictures_of_the_vae_are_told_as_its_own(pipeline: Path, bias: float, words: str) -> None:
    path = weights_of(pipeline / "vae")
    weights = load_file(path)
    weights["decoder.conv_out.bias"][:] = bias
    save_file(weights, path)
    with pytest.raises(NonFiniteError, match=f"the VAE .* {words}.*name another with `vae`"):
        Studio(Components.find(str(pipeline))).decode(torch.randn(1, 16, 16, 16))


def test_a_prompt_that_is_cut_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    studio = Studio(Components.find("lab.base"))
    (whole,) = studio.captions([SHOT.prompt])
    monkeypatch.setattr("mergetool.sampler.studio.MAX_CAPTION", 8)
    cut = Studio(Components.find("lab.base"))
    (found,) = cut.captions([SHOT.prompt])
    assert len(found) == 8
    assert (studio.notes, [f"of the {len(whole)} tokens" in note for note in cut.notes]) == ([], [True])


def test_a_prompt_longer_than_the_models_positions_is_refused() -> None:
    studio = Studio(Components.find("lab.base"))
    with pytest.raises(UsageError, match=r"lab\.base reads 224 at most"):
        studio.first_stage(Stage("lab.base", steps=1), [Shot("circle " * 300)], (64, 64))


def test_a_block_that_lacks_a_tensor_is_seen_in_the_header(pipeline: Path) -> None:
    path = weights_of(pipeline / "transformer")
    weights = load_file(path)
    del weights["layers.3.attention.to_q.weight"]
    save_file(weights, path)
    with pytest.raises(DataError, match=r'lacks "layers\.3\.attention\.to_q\.weight" that its architecture needs'):
        load_transformer(str(pipeline), dtype=torch.float32, device="cpu")


def test_a_picture_keeps_its_size_through_the_vae() -> None:
    studio = Studio(Components.find("lab.base"))
    assert studio.decode(studio.encode(np.full((1, 24, 40, 3), 99, np.uint8))).shape == (1, 24, 40, 3)
