"""Outputs are what their name says, whichever command writes them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool as library
from mergetool.errors import MergetoolError
from tests.adapters.spellings import SPELLINGS
from tests.cli.run import mergetool
from tests.families import checkpoint

RECIPE = "r.yaml"
COMMANDS = {
    "convert": ("convert", "base.safetensors"),
    "merge": ("merge", "0.5*base.safetensors + 0.5*tuned.safetensors", "--force"),
    "a recipe": ("merge", RECIPE),
    "bake": ("lora", "bake", "base.safetensors", "lora.safetensors"),
    "diff": ("diff", "--base", "base.safetensors", "--variant", "tuned.safetensors", "--min-dim", "4"),
    "lora convert": ("lora", "convert", "lora.safetensors"),
    "lora merge": ("lora", "merge", "lora.safetensors"),
    "lora resize": ("lora", "resize", "lora.safetensors", "--rank", "1"),
    "replay": ("replay", "made.safetensors"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    checkpoint(folder / "base.safetensors")
    checkpoint(folder / "tuned.safetensors", variant=1)
    SPELLINGS["musubi"]().save(folder).rename(folder / "lora.safetensors")
    (folder / RECIPE).write_text("models: {base: base.safetensors}\nmerge: base\n")
    assert mergetool("merge", "1*base.safetensors", "-o", "made.safetensors", cwd=folder).code == 0
    return folder


@pytest.fixture
def here(inputs: Path, tmp_path: Path) -> Path:
    for file in inputs.iterdir():
        if file.is_file():
            os.link(file, tmp_path / file.name)
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_without_an_ending_is_a_file_and_the_command_says_so(command: str, here: Path) -> None:
    ran = mergetool(*COMMANDS[command], "-o", "zimage_v1.5", cwd=here)
    assert ran.code == 0, ran.err
    assert load_file(here / "zimage_v1.5.safetensors")
    assert not (here / "zimage_v1.5").exists()
    assert "zimage_v1.5.safetensors" in ran.out
    if command != "a recipe":  # which lists its outputs with their places
        assert 'note    the output is "zimage_v1.5.safetensors"' in ran.out


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["m.ckpt", "m.safetensor"])
def test_another_ending_is_refused_before_anything_is_written(command: str, name: str, here: Path) -> None:
    before = set(here.iterdir())
    ran = mergetool(*COMMANDS[command], "-o", name, cwd=here)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran.err
    assert ".safetensors" in ran.err
    assert set(here.iterdir()) - before <= {here / "config"}


def test_an_ending_in_capitals_is_a_file(here: Path) -> None:
    for name in ("M.SAFETENSORS", "flux.sft"):
        assert mergetool("convert", "base.safetensors", "-o", name, cwd=here).code == 0
        assert load_file(here / name).keys() == load_file(here / "base.safetensors").keys()


def test_a_folder_is_called_one_and_has_no_diffusers_config_with_comfyui_names(here: Path) -> None:
    ran = mergetool("convert", "base.safetensors", "-o", "out/", cwd=here)
    assert "done    folder out" in ran.out
    assert os.listdir(here / "out") == ["diffusion_pytorch_model.safetensors"]


def test_a_folder_in_the_diffusers_layout_has_its_config(here: Path) -> None:
    assert mergetool("convert", "base.safetensors", "-o", "out", "--layout", "diffusers", cwd=here).code == 0
    assert sorted(os.listdir(here / "out")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = mergetool("convert", "base.safetensors", "-o", "out", "--overwrite", cwd=here)
    assert "done    folder out" in again.out, again.err


def test_a_recipe_names_a_folder_with_a_slash(here: Path) -> None:
    (here / "f.yaml").write_text("models: {base: base.safetensors}\nmerge: base\noutput: out/\n")
    made = mergetool("merge", "f.yaml", cwd=here)
    assert made.code == 0, made.err
    assert os.listdir(here / "out") == ["diffusion_pytorch_model.safetensors"]
    assert "up to date" in mergetool("merge", "f.yaml", cwd=here).out


def test_python_writes_what_the_command_line_writes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    with pytest.warns(UserWarning, match=r'"v1\.5\.safetensors"'):
        assert library.merge("1*base.safetensors", "v1.5").output == Path("v1.5.safetensors")
    with pytest.warns(UserWarning, match=r'"d1\.5\.safetensors"'):
        library.diff("base.safetensors", "tuned.safetensors", "d1.5", min_dim=4)
    library.Recipe(RECIPE).make("recipe_v2")
    assert load_file("d1.5.safetensors").keys()
    assert load_file("recipe_v2.safetensors").keys()
    for write in (
        lambda: library.merge("1*base.safetensors", "m.ckpt"),
        lambda: library.diff("base.safetensors", "tuned.safetensors", "m.pt"),
        lambda: library.Recipe(RECIPE).make("m.gguf"),
    ):
        with pytest.raises(MergetoolError, match=r"m\.safetensors"):
            write()


def test_a_text_encoders_folder_keeps_the_name_that_transformers_looks_for(tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=64,
    )
    torch.manual_seed(3)
    encoder = Qwen3Model(config)
    encoder.save_pretrained(tmp_path / "encoder", max_shard_size="20KB")
    ran = mergetool("convert", "encoder", "-o", "other", "--shard-size", "20kB", "--dtype", "fp32", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "model.safetensors.index.json" in os.listdir(tmp_path / "other")
    loaded = Qwen3Model.from_pretrained(tmp_path / "other")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in encoder.state_dict().items())


def test_the_name_of_a_folder_of_models_is_no_output(here: Path) -> None:
    (here / "models").mkdir()
    save_file({"x": torch.zeros(2)}, here / "models" / "other.safetensors")
    ran = mergetool("convert", "base.safetensors", "-o", "models", "--overwrite", cwd=here)
    assert (ran.code, "is a folder; name a file in it" in ran.err) == (73, True), ran.err
    assert not (here / "models.safetensors").exists()
