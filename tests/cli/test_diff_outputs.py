"""``mergetool diff`` of LoRAs, of two variants, with a file of whole differences and a checkpoint: as a user would run it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F32
from tests.cli.run import mergetool
from tests.families import checkpoint

BASE = ("diff", "--base", "base.safetensors")
ONE = (*BASE, "--variant", "one.safetensors", "--rank-max", 0)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("family")
    checkpoint(folder / "base.safetensors", dtype=F32)
    for name, seed in (("one", 1), ("two", 2)):
        checkpoint(folder / f"{name}.safetensors", variant=seed, dtype=F32)
    return folder


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], names: set[str]) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in names) ** 0.5


def test_the_checkpoint_is_the_base_with_both_files_added(family: Path, tmp_path: Path) -> None:
    ran = mergetool(
        *ONE, "--rank-thresh", 0.999999, "--dtype", "fp32", "--full", tmp_path / "full.safetensors",
        "--checkpoint", tmp_path / "baked.safetensors", "-o", tmp_path / "lora.safetensors", cwd=family,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "base.safetensors with it added" in ran.out
    base, one, baked = (load_file(path) for path in (family / "base.safetensors", family / "one.safetensors", tmp_path / "baked.safetensors"))  # fmt: skip
    pads = {name for name in base if "pad_token" in name}
    assert distance(baked, one, base.keys() - pads) < 2e-3 * distance(base, one, base.keys() - pads)
    assert all(torch.equal(baked[name], base[name]) for name in pads)


def test_the_checkpoint_is_what_lora_bake_writes(family: Path, tmp_path: Path) -> None:
    outputs = ("-o", tmp_path / "lora.safetensors", "--checkpoint", tmp_path / "baked.safetensors")
    assert mergetool(*ONE, *outputs, cwd=family).code == 0
    ran = mergetool(
        "lora", "bake", "base.safetensors", tmp_path / "lora.safetensors", "-o", tmp_path / "b.safetensors", cwd=family
    )
    assert ran.code == 0, ran.err
    one, other = load_file(tmp_path / "baked.safetensors"), load_file(tmp_path / "b.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_output_says_what_went_into_which_file(family: Path, tmp_path: Path) -> None:
    ran = mergetool(
        *ONE, "--full", tmp_path / "full.safetensors", "--full-layer", "embedder", "-o", tmp_path / "l.safetensors",
        cwd=family,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "--full-layer, stored whole" in ran.out
    assert "for ComfyUI, beside the LoRA" in ran.out
    assert "neither a weight nor a bias, which no program applies" in ran.out
    assert not any(".diff" in key for key in load_file(tmp_path / "l.safetensors"))
    assert all(key.endswith((".diff", ".diff_b")) for key in load_file(tmp_path / "full.safetensors"))


def test_matrices_that_are_smaller_whole_are_named_with_the_option(family: Path, tmp_path: Path) -> None:
    ran = mergetool(*ONE, "--rank-thresh", 1, "-o", tmp_path / "l.safetensors", cwd=family)
    assert ran.code == 0, ran.err
    assert "would be smaller stored whole" in ran.out
    assert "--full-layer PATTERN" in ran.out
    ran = mergetool(*ONE, "--rank", 2, "-o", tmp_path / "l.safetensors", "--overwrite", cwd=family)
    assert "would be smaller stored whole" not in ran.out


def test_a_lora_of_the_first_run_is_the_variant_of_the_second(family: Path, tmp_path: Path) -> None:
    assert mergetool(*ONE, "--rank", 6, "-o", tmp_path / "lora.safetensors", cwd=family).code == 0
    ran = mergetool(
        *BASE, "--variant", tmp_path / "lora.safetensors", "--rank-thresh", 1, "--dtype", "fp32", "-o",
        tmp_path / "again.safetensors", cwd=family,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert "a LoRA, so that its change to base.safetensors is the difference" in ran.out
    assert "left out" not in ran.out
    first, second = load_file(tmp_path / "lora.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys()
    for key in (key for key in first if key.endswith(".lora_A.weight")):
        up = key.replace("lora_A", "lora_B")
        one, two = (tensors[up].double().numpy() @ tensors[key].double().numpy() for tensors in (first, second))
        assert np.linalg.norm(one - two) < 1e-6 * np.linalg.norm(one), key


def test_what_two_variants_share_and_their_union(family: Path, tmp_path: Path) -> None:
    two = ("--variant2", "two.safetensors", "-o", tmp_path / "c.safetensors", "--overwrite")
    ran = mergetool(*ONE, *two, cwd=family)
    assert ran.code == 0, ran.err
    assert "the change that one.safetensors and two.safetensors have in common" in ran.out
    assert "energy in the difference to two.safetensors" in ran.out
    ran = mergetool(*ONE, *two, "--union", "--weights", "1,0.5", "--json", cwd=family)
    assert ran.code == 0, ran.err
    assert ran.json["variant2"] == "two.safetensors"
    assert all(0 <= share <= 1 for layer in ran.json["layers"] for share in layer["common_share"])


def test_the_part_that_is_orthogonal_to_a_second_variant(family: Path, tmp_path: Path) -> None:
    ran = mergetool(*ONE, "--variant2", "two.safetensors", "--orthogonal", "-o", tmp_path / "o.safetensors", cwd=family)
    assert ran.code == 0, ran.err
    assert "the part of one.safetensors that is orthogonal to two.safetensors" in ran.out
    assert "energy in the difference to" not in ran.out


def test_interference_of_two_checkpoints_is_that_of_their_differences(family: Path) -> None:
    names = ("one.safetensors", "two.safetensors")
    ran = mergetool("lora", "interference", *names, "--base", "base.safetensors", "--json", cwd=family)
    assert ran.code == 0, ran.err
    base, one, two = (load_file(family / f"{name}.safetensors") for name in ("base", "one", "two"))
    (pair,) = ran.json["pairs"]
    matrix = "layers.0.feed_forward.w1.weight"
    (found,) = [module for module in pair["modules"] if module["name"] == matrix]
    deltas = [(model[matrix].double() - base[matrix].double()).numpy() for model in (one, two)]
    norms = [float(np.linalg.norm(delta)) for delta in deltas]
    assert found["norms"] == pytest.approx(norms, rel=1e-6)
    assert found["cosine"] == pytest.approx(float((deltas[0] * deltas[1]).sum()) / norms[0] / norms[1], abs=1e-6)
    left_out = {entry["name"]: entry["reason"] for entry in pair["left_out"]}
    assert left_out["layers.0.attention_norm1.weight"] == "one-dimensional"


def test_json_says_what_was_stored_whole(family: Path, tmp_path: Path) -> None:
    ran = mergetool(*ONE, "--json", "--full", tmp_path / "f.safetensors", "-o", tmp_path / "l.safetensors", cwd=family)
    assert ran.code == 0, ran.err
    assert ran.json["full"] == str(tmp_path / "f.safetensors")
    shares = [entry["share"] for entry in (*ran.json["whole"], *ran.json["skipped"])]
    assert 0 < sum(shares) < 1
    assert ran.json["checkpoint"] is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--weights", "1"), "two numbers"),
        (("--union",), "--variant2"),
        (("--orthogonal",), "--variant2"),
        (("--variant2", "two.safetensors", "--union", "--orthogonal"), "leave one out"),
        (("--full-layer", "ffn"), "--full FILE"),
        (("--checkpoint", "x.bin"), 'name it "x.safetensors"'),
        (("--checkpoint", "absent/x.safetensors"), '"absent" does not exist'),
        (("--checkpoint", "l.safetensors", "-o", "l.safetensors"), "another name"),
        (("--variant2", "two.safetensors", "--spectra", "s.safetensors"), "leave one of them out"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(
    family: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    before = sorted(family.iterdir())
    ran = mergetool(*ONE, *arguments, cwd=family)
    assert ran.code in (2, 73)
    assert sentence in ran.err
    assert ran.err.count("\n") == 1
    assert sorted(path for path in family.iterdir() if path.name != "config") == before


def test_a_checkpoint_that_exists_is_refused_before_the_work(family: Path, tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "there.safetensors")
    outputs = ("--checkpoint", tmp_path / "there.safetensors", "-o", tmp_path / "l.safetensors")
    ran = mergetool(*ONE, *outputs, cwd=family)
    assert ran.code == 73
    assert not (tmp_path / "l.safetensors").exists()


def test_two_models_may_be_named_without_options(family: Path, tmp_path: Path) -> None:
    names = ("base.safetensors", "one.safetensors", "--rank", 2)
    assert mergetool("diff", *names, "-o", tmp_path / "a.safetensors", cwd=family).code == 0
    assert mergetool(*ONE[:-2], "--rank", 2, "-o", tmp_path / "b.safetensors", cwd=family).code == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("names", [("base.safetensors",), ("a", "b", "c"), ("--base", "a", "b", "c")])
def test_one_model_or_three_are_answered_with_the_line_that_works(family: Path, names: tuple[str, ...]) -> None:
    ran = mergetool("diff", *names, cwd=family)
    assert (ran.code, "mergetool diff --base MODEL --variant MODEL" in ran.err) == (2, True), ran.err


def test_a_threshold_with_a_comma_is_refused_with_the_number(family: Path) -> None:
    ran = mergetool(*ONE, "--rank-thresh", "0,995", "--dry-run", cwd=family)
    assert (ran.code, '--rank-thresh is "0,995", but has to be a number above 0; write 0.995' in ran.err) == (2, True)


def test_a_checkpoint_at_the_place_of_another_output_is_refused_before_the_work(family: Path, tmp_path: Path) -> None:
    ran = mergetool(*ONE, "-o", tmp_path / "a.safetensors", "--checkpoint", tmp_path / "a.safetensors", cwd=family)
    assert (ran.code, "--checkpoint names the same file" in ran.err) == (2, True), ran.err
    assert not list(tmp_path.iterdir())
