"""What commands say of the text encoders of all-in-one files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mergetool
from tests.cli.run import Ran
from tests.cli.run import mergetool as program
from tests.recipe.test_encoders import lora, unet
from tests.text_encoders import beside

UNET, L_FC1 = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q", "lora_te1_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        save_file({**unet(seed), **beside(seed, torch.float16)}, f"{name}.safetensors")
    save_file({**lora(UNET, rows=64), **lora(L_FC1)}, "lora.safetensors")


def run(*arguments: str) -> Ran:
    return program(*arguments, cwd=Path.cwd())


def test_inspect_lists_them_as_groups_that_count_in_no_total() -> None:
    found = run("inspect", "a.safetensors", "--json").json
    model = sum(tensor.numel() for tensor in unet(0).values())
    assert found["parameters"] == model
    groups = {name: group["parameters"] for name, group in found["groups"].items()}
    assert groups["text_encoder"] == groups["clip_l"] + groups["clip_g"]
    assert groups["clip_g"] == sum(t.numel() for n, t in beside(0).items() if n.startswith("conditioner.embedders.1."))


def test_compare_measures_them_outside_the_totals() -> None:
    found = run("compare", "a.safetensors", "b.safetensors", "--json").json
    assert found["groups"]["clip_g"]["excluded"]
    assert found["total"]["elements"] == sum(tensor.numel() for tensor in unet(0).values())
    assert "of text encoders, which are in no total" in run("compare", "a.safetensors", "b.safetensors").out


def test_lora_inspect_says_whether_the_model_has_them() -> None:
    alone = run("lora", "inspect", "lora.safetensors", "--json").json
    given = run("lora", "inspect", "lora.safetensors", "--model", "a.safetensors", "--json").json
    part = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    assert part in {target["part"] for target in given["targets"]}
    assert (given["text_encoder"], given["unmatched"]) == ([], [])
    assert part not in {target["part"] for target in alone["targets"]}


def test_verify_finds_the_merge_right_and_replay_makes_it_again() -> None:
    mergetool.merge("'a.safetensors' + 0.5*('b.safetensors' - 'a.safetensors')", "out.safetensors", force=True)
    assert mergetool.replay("out.safetensors").same
    assert run("verify", "out.safetensors").code == 0
