"""The commands `lora inspect`, `lora convert` and `lora verify`, as a user runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.adapters.spellings import BLOCK, DIM, SPELLINGS, loha, random, split
from tests.cli.run import mergetool
from tests.families import checkpoint


@pytest.fixture
def musubi(tmp_path: Path) -> Path:
    written = SPELLINGS["musubi"]()
    written.metadata = {"ss_network_module": "networks.lora_zimage"}
    return written.save(tmp_path)


def test_inspect_says_what_is_in_it_and_who_loads_it(musubi: Path, tmp_path: Path) -> None:
    ran = mergetool("lora", "inspect", musubi, cwd=tmp_path)
    assert ran.code == 0, ran.err
    for words in ("lora_unet_", "kohya-type trainer (networks.lora_zimage)", "2 / 3 / 4 (mixed)", "8 (7)", "14 bf16",
                  "layers.1", "diffusers 0.40 and 0.42.1: whole", "diffusers 0.38 and 0.39: partly, 2 of 7 parts",
                  "diffusers 0.36: not at all", "ComfyUI 0.30: partly, 2 of 7 parts", "not mapped"):  # fmt: skip
        assert words in ran.out
    found = mergetool("lora", "inspect", musubi, "--json", cwd=tmp_path).json
    assert found["loading"]["diffusers"]["0.42.1"]["verdict"] == "whole"
    assert len(found["loading"]["ComfyUI"]["0.30"]["dropped"]) == 5
    assert found["rank"] == {"min": 2, "median": 3, "max": 4}
    assert len(found["targets"]) == 7


def test_inspect_draws_a_plot_and_replaces_none(musubi: Path, tmp_path: Path) -> None:
    ran = mergetool("lora", "inspect", musubi, "--plot", "norms.png", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    assert mergetool("lora", "inspect", musubi, "--plot", "norms.png", cwd=tmp_path).code == 73


def test_names_from_a_file_cannot_reach_the_terminal(tmp_path: Path) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
    written.tensors["\x1b[2Jevil\n\u202e"] = torch.zeros(1)
    written.metadata = {"ss_network_module": "\x1b]0;owned\x07"}
    lora = written.save(tmp_path)
    for command in (
        ("inspect", lora),
        ("inspect", lora, "-v"),
        ("convert", lora, "-o", "x.safetensors", "--skip-unmatched"),
    ):
        ran = mergetool("lora", *command, cwd=tmp_path)
        assert ran.code == 0, ran.err
        assert not any(character in ran.out + ran.err for character in "\x1b\x07\u202e")
        assert "evil" in ran.out


def test_convert_says_what_it_did_and_who_loads_the_result(musubi: Path, tmp_path: Path) -> None:
    ran = mergetool("lora", "convert", musubi, "-o", "out.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "7 modules, every value as it was" in ran.out
    assert "diffusers 0.36, 0.38, 0.39, 0.40 and 0.42.1: whole" in ran.out
    assert "ComfyUI 0.30: whole" in ran.out
    ran = mergetool("lora", "convert", musubi, "-o", "d.safetensors", "--key-format", "diffusers", cwd=tmp_path)
    assert "rounded" in ran.out
    assert "not every value" in ran.out
    found = mergetool("lora", "convert", musubi, "-o", "p", "--key-format", "peft", "--json", cwd=tmp_path).json
    assert found["lossless"] is True
    assert found["modules"] == 7
    assert (tmp_path / "p" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["-o", "x.safetensors", "--key-format", "a1111"], 2, '--key-format is "a1111", but has to be one of'),
        (["-o", "there.safetensors"], 73, "--overwrite"),
        (["-o", "x/"], 2, "one file"),
        (["-o", "x.safetensors", "--key-format", "peft"], 2, "a folder"),
        (["-o", "x.safetensors", "--model", "nowhere.safetensors"], 66, "nowhere"),
        (["-o", "no/x.safetensors"], 73, "does not exist"),
    ],
)
def test_a_wrong_request_is_one_sentence(
    musubi: Path, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    (tmp_path / "there.safetensors").write_text("mine")
    ran = mergetool("lora", "convert", musubi, *options, cwd=tmp_path)
    assert (ran.code, words in ran.err) == (code, True), ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_convert_refuses_what_a_format_cannot_carry_with_a_way_out(tmp_path: Path) -> None:
    ran = mergetool(
        "lora", "convert", loha("diffusion_model.").save(tmp_path), "-o", "x.safetensors", "--key-format", "diffusers", cwd=tmp_path
    )  # fmt: skip
    assert ran.code == 65
    assert "--key-format default can" in ran.err


def test_a_model_of_another_family_tells_the_names(tmp_path: Path) -> None:
    module = "double_layers.4.mlpX.c_fc1"
    save_file({f"model.diffusion_model.{module}.weight": torch.zeros(8, 8)}, tmp_path / "m.safetensors")
    save_file(
        {f"lora_unet_{module.replace('.', '_')}.lora_{x}.weight": random(8, 8, seed=1) for x in ("up", "down")},
        tmp_path / "lora.safetensors",
    )
    command = ("lora", "convert", "lora.safetensors", "-o", "x.safetensors", "--key-format", "comfyui")
    assert mergetool(*command, cwd=tmp_path).code == 65
    ran = mergetool(*command, "--model", "m.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert f"diffusion_model.{module}.lora_up.weight" in load_file(tmp_path / "x.safetensors")
    assert "loads   not proved" in ran.out
    refused = mergetool(*command[:-1], "default", "--model", "m.safetensors", "--overwrite", cwd=tmp_path)
    assert (refused.code, refused.err.count("\n")) == (65, 1)
    assert "--key-format comfyui or --key-format kohya keeps the names" in refused.err


def test_of_a_model_whose_names_are_not_known_diff_claims_nothing(tmp_path: Path) -> None:
    names = [f"blocks.{i}.attn1.to_{x}.weight" for i in range(2) for x in "qkv"]
    for seed, name in enumerate(("base", "tuned")):
        save_file(
            {key: random(64, 64, seed=seed * 10 + i) for i, key in enumerate(names)}, tmp_path / f"{name}.safetensors"
        )
    command = (
        "diff",
        "--base",
        "base.safetensors",
        "--variant",
        "tuned.safetensors",
        "--rank",
        4,
        "-o",
        "out.safetensors",
    )
    ran = mergetool(*command, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "loads   not proved" in ran.out
    assert "whole" not in ran.out
    assert mergetool(*command, "--overwrite", "--json", cwd=tmp_path).json["loading"] == {}


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    """base.safetensors, and tuned.safetensors that differs by lora.safetensors and a norm."""
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
    written.save(tmp_path)
    checkpoint(tmp_path / "base.safetensors", layout="diffusers")
    tensors = load_file(tmp_path / "base.safetensors")
    for part, change in written.changes.items():
        tensors[part] = (tensors[part].double() + torch.from_numpy(change)).bfloat16()
    tensors[f"{BLOCK}.attention_norm1.weight"] = tensors[f"{BLOCK}.attention_norm1.weight"] + torch.ones(DIM).bfloat16()
    save_file(tensors, tmp_path / "tuned.safetensors")
    return tmp_path


def test_verify_prints_groups_and_the_worst(tuned: Path) -> None:
    ran = mergetool("lora", "verify", "base.safetensors", "lora.safetensors", "tuned.safetensors", cwd=tuned)
    assert ran.code == 0, ran.err
    assert "attention_norm1.weight" in ran.out.split("worst")[1]
    for words in (
        "before rounding",
        "after rounding",
        "diffusers 0.40 and 0.42.1: whole",
        "ComfyUI 0.30: whole",
        "not changed by the LoRA",
    ):
        assert words in ran.out


@pytest.mark.parametrize(("most", "code"), [("0.5", 0), ("0.0001", 1)])
def test_verify_exits_1_above_the_residual_that_is_allowed(tuned: Path, most: str, code: int) -> None:
    files = ("base.safetensors", "lora.safetensors", "tuned.safetensors")
    ran = mergetool("lora", "verify", *files, "--max-residual", most, "--json", cwd=tuned)
    assert ran.code == code, ran.err
    assert ran.json["passed"] is (code == 0)
    assert 0.0001 < ran.json["residual_after"] < 0.5
    assert bool(ran.err) is (code == 1)


@pytest.mark.parametrize("options", [["--strength", "much"], ["--max-residual", "nan"], ["--max-residual", "-1"]])
def test_verify_refuses_numbers_that_are_none(tuned: Path, options: list[str]) -> None:
    files = ("base.safetensors", "lora.safetensors", "tuned.safetensors")
    assert mergetool("lora", "verify", *files, *options, cwd=tuned).code == 2


def test_verify_at_another_strength(tuned: Path) -> None:
    files = ("base.safetensors", "lora.safetensors", "tuned.safetensors")
    half = mergetool("lora", "verify", *files, "--strength", "0.5", "--json", cwd=tuned).json
    assert half["strength"] == 0.5
    layer = next(one for one in half["layers"] if one["name"] == f"{BLOCK}.feed_forward.w1.weight")
    assert layer["residual_before"] == pytest.approx(0.5, abs=0.01)


def test_inspect_names_what_is_not_read_and_what_is_for_a_text_encoder(tmp_path: Path) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
    written.tensors |= {
        f"diffusion_model.{BLOCK}.attention.to_z.oft_R.weight": torch.zeros(8, 28),
        "text_encoder.model.layers.0.mlp.lora_A.weight": torch.zeros(2, 2),
    }
    lora = written.save(tmp_path)
    ran = mergetool("lora", "inspect", lora, cwd=tmp_path)
    assert ran.code == 0, ran.err
    for words in ("7 lora, 1 OFT that is not read", "1 keys, OFT, which is not read", "1 keys, of a text encoder"):
        assert words in ran.out
    found = mergetool("lora", "inspect", lora, "--json", cwd=tmp_path).json
    assert (found["unread"], len(found["text_encoder"])) == ({"OFT": 1}, 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inspect_sees_nan_and_infinity(tmp_path: Path, value: float) -> None:
    written = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight")
    name = f"diffusion_model.{BLOCK}.attention.to_k.lora_B.weight"
    written.tensors[name][1, 1] = value
    lora = written.save(tmp_path)
    ran = mergetool("lora", "inspect", lora, cwd=tmp_path)
    assert f"1 tensors hold NaN or infinity: {name}" in " ".join(ran.out.split())
    assert mergetool("lora", "inspect", lora, "--json", cwd=tmp_path).json["non_finite"] == [name]


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_lora_given_as_a_model_names_its_kind_and_the_command_for_it(tmp_path: Path, command: str) -> None:
    lora = split("diffusion_model.", ".lora_A.weight", ".lora_B.weight").save(tmp_path)
    ran = mergetool(command, lora, *(["-o", "x.safetensors"] if command == "convert" else []), cwd=tmp_path)
    assert ran.code == 65
    assert "is a LoRA file" in ran.err
    assert "mergetool lora bake MODEL" in ran.err


def test_a_lora_of_which_nothing_meets_the_base_is_never_verified(tuned: Path) -> None:
    save_file(
        {f"diffusion_model.blocks.0.q.lora_{x}.weight": random(4, 4, seed=1) for x in "AB"}, tuned / "x.safetensors"
    )
    ran = mergetool("lora", "verify", "base.safetensors", "x.safetensors", "tuned.safetensors", cwd=tuned)
    assert (ran.code, "adds nothing to base.safetensors" in ran.err) == (65, True), ran.err


def test_inspect_with_a_model_measures_how_far_comfyuis_dora_is_from_trainings(tmp_path: Path) -> None:
    checkpoint(tmp_path / "base.safetensors")
    name = f"diffusion_model.{BLOCK}.attention.to_out.0"
    tensors = {f"{name}.lora_down.weight": random(2, DIM, seed=1), f"{name}.lora_up.weight": random(DIM, 2, seed=2)}
    for shape, measured in (((DIM, 1), True), ((1, DIM), False)):
        save_file(tensors | {f"{name}.dora_scale": torch.ones(shape)}, tmp_path / "dora.safetensors")
        command = ("lora", "inspect", "dora.safetensors", "--model", "base.safetensors")
        found = mergetool(*command, "--json", cwd=tmp_path).json
        assert (found["dora_in_comfyui"] is not None) is measured
        assert ("ComfyUI's weights are" in mergetool(*command, cwd=tmp_path).out) is measured
