"""``mergetool lora resize, merge, subtract, orthogonal, common, interference`` as a user types them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mergetool as mergetool_api
from mergetool.options.kinds import with_strength
from tests.adapters.spellings import SPELLINGS, Written
from tests.cli.run import mergetool
from tests.lora.test_combine import changes, close

Q = "layers.1.attention.to_q.weight"


def make(folder: Path, **names: str) -> dict[str, Written]:
    made = {}
    for name, spelling in names.items():
        (folder / "tmp").mkdir(exist_ok=True)
        made[name] = SPELLINGS[spelling]()
        made[name].save(folder / "tmp").rename(folder / f"{name}.safetensors")
    return made


def test_resize_to_a_rank_says_what_it_did_and_loads_as_the_best_of_that_rank(tmp_path: Path) -> None:
    made = make(tmp_path, a="musubi")
    ran = mergetool(
        "lora", "resize", "a.safetensors", "-o", "out.safetensors", "--rank", 2, "--dtype", "fp32", cwd=tmp_path
    )
    assert (ran.code, ran.err) == (0, "")
    assert "1 x a.safetensors: 7 changes, rank 2 to 4" in ran.out
    assert "attention        5     2 to 4         2 / 2 / 2" in ran.out
    assert "diffusers 0.36, 0.38, 0.39, 0.40 and 0.42.1: whole" in ran.out
    assert "ComfyUI 0.30: whole" in ran.out
    for part, exact in made["a"].changes.items():
        left, values, right = np.linalg.svd(exact)
        close(changes(tmp_path / "out.safetensors")[part], (left[:, :2] * values[:2]) @ right[:2], 1e-5)


def test_json_is_one_object_with_every_module(tmp_path: Path) -> None:
    made = make(tmp_path, a="bare")
    command = ["lora", "resize", "a.safetensors", "-o", "out.safetensors", "--rank-thresh", "0.9", "--json"]
    found = mergetool(*command, cwd=tmp_path).json
    assert {one["name"] for one in found["modules"]} == made["a"].changes.keys()
    assert all(one["energy"] >= 0.9 and one["rank"] <= one["rank_read"] for one in found["modules"])
    assert found["bytes_written"] == (tmp_path / "out.safetensors").stat().st_size


def test_a_budget_bounds_the_file(tmp_path: Path) -> None:
    make(tmp_path, a="bare")
    assert (
        mergetool("lora", "resize", "a.safetensors", "-o", "o.safetensors", "--budget", "5kB", cwd=tmp_path).code == 0
    )
    assert 4000 < (tmp_path / "o.safetensors").stat().st_size <= 5000


def test_merge_with_strengths_and_groups(tmp_path: Path) -> None:
    made = make(tmp_path, a="bare", b="kohya fused")
    ran = mergetool(
        "lora",
        "merge",
        "a.safetensors:0.5",
        "b.safetensors:-2",
        "-o",
        "out.safetensors",
        "--set",
        "ffn=0",
        cwd=tmp_path,
    )
    assert ran.code == 0
    found = changes(tmp_path / "out.safetensors")
    close(found[Q], 0.5 * made["a"].changes[Q] - 2 * made["b"].changes[Q], 1e-6)
    assert not any("feed_forward" in part for part in found)
    assert "2 left out (strength 0 in a.safetensors)" in ran.out


def test_subtract_gives_back_what_was_added(tmp_path: Path) -> None:
    made = make(tmp_path, a="bare", b="kohya fused")
    mergetool("lora", "merge", "a.safetensors", "b.safetensors", "-o", "both.safetensors", cwd=tmp_path)
    ran = mergetool(
        "lora", "subtract", "both.safetensors", "b.safetensors", "-o", "rest.safetensors", "--rank", 4, "--dtype", "fp32",
        cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0
    close(changes(tmp_path / "rest.safetensors")[Q], made["a"].changes[Q], 1e-5)


def test_orthogonal_and_common_write_loras(tmp_path: Path) -> None:
    made = make(tmp_path, a="bare", b="kohya fused")
    for command in ("orthogonal", "common"):
        ran = mergetool("lora", command, "a.safetensors", "b.safetensors", "-o", f"{command}.safetensors", cwd=tmp_path)
        assert (ran.code, ran.err) == (0, "")
    along = made["b"].changes[Q]
    rest = changes(tmp_path / "orthogonal.safetensors")[Q]
    assert abs((rest * along).sum()) < 5e-3 * np.linalg.norm(rest) * np.linalg.norm(along)
    assert "3 left out (only in a.safetensors)" in ran.out
    assert changes(tmp_path / "common.safetensors").keys() == made["b"].changes.keys()


def test_interference_prints_groups_and_overall_for_every_pair(tmp_path: Path) -> None:
    make(tmp_path, a="bare", b="kohya fused", c="bare")
    names = ["a.safetensors", "b.safetensors", "c.safetensors"]
    ran = mergetool("lora", "interference", *names, "--signs", cwd=tmp_path)
    assert ran.code == 0
    assert [line.split(":")[0] for line in ran.out.splitlines() if line.startswith("pair")] == [
        "pair    A = a.safetensors, B = b.safetensors",
        "pair    A = a.safetensors, B = c.safetensors",
        "pair    A = b.safetensors, B = c.safetensors",
    ]
    assert "+1.0000  100.0 %  100.0 %  100.0 %     0.000" in ran.out
    found = mergetool("lora", "interference", *names, "--json", cwd=tmp_path).json
    assert found["pairs"][1]["overall"]["cosine"] == pytest.approx(1)
    assert len(found["pairs"][0]["modules"]) == 7


def test_a_dry_run_lists_every_module_and_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path, a="bare", b="LoHa")
    ran = mergetool("lora", "merge", "a.safetensors", "b.safetensors:0.3", "--dry-run", cwd=tmp_path)
    assert ran.code == 0
    assert "layers.1.attention.to_k.weight  [64, 64]  1 x lora 2 + 0.3 x loha 3" in ran.out
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == ["a.safetensors", "b.safetensors"]
    assert len(mergetool("lora", "resize", "a.safetensors", "--dry-run", "--json", cwd=tmp_path).json["modules"]) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "say how much to keep"),
        (("--rank", "0"), '--rank is "0", but has to be a whole number from 1'),
        (("--rank-thresh", "0"), "above 0"),
        (("--rank", "4", "--budget", "1MB"), "--rank and --budget contradict each other"),
        (("--rule", "ratio"), "--rule ratio needs a --rank-thresh"),
        (("--rule", "knee", "--rank-thresh", "0.5"), "--rule knee has no threshold"),
        (("--rule", "best", "--rank-thresh", "0.5"), '--rule is "best", but has to be one of energy'),
        (("--rank", "2", "--dtype", "fp8_e4m3"), '--dtype is "fp8_e4m3", but has to be one of bf16, fp16, fp32'),
    ],
)
def test_requests_that_cannot_be_meant_are_usage_errors(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    make(tmp_path, a="bare")
    ran = mergetool("lora", "resize", "a.safetensors", "-o", "out.safetensors", *options, cwd=tmp_path)
    assert (ran.code, ran.out.count("\n") > 1) == (2, False)
    assert words in ran.err
    assert not (tmp_path / "out.safetensors").exists()


def test_without_an_output_nothing_is_read(tmp_path: Path) -> None:
    ran = mergetool("lora", "merge", "missing.safetensors", cwd=tmp_path)
    assert (ran.code, "the request names no output; add -o, or --dry-run" in ran.err) == (2, True)


def test_a_warning_of_a_file_is_shown(tmp_path: Path) -> None:
    made = make(tmp_path, a="musubi")
    tensors = {key: value for key, value in made["a"].tensors.items() if not key.endswith(".alpha")}
    save_file(tensors, tmp_path / "a.safetensors")
    ran = mergetool("lora", "resize", "a.safetensors", "-o", "out.safetensors", "--rank", 1, cwd=tmp_path)
    assert "states no alpha, where such files do" in ran.out


def test_a_knee_needs_no_threshold(tmp_path: Path) -> None:
    make(tmp_path, a="bare")
    ran = mergetool("lora", "resize", "a.safetensors", "-o", "o.safetensors", "--rule", "knee", cwd=tmp_path)
    assert ran.code == 0
    ranks = {len(value) for key, value in load_file(tmp_path / "o.safetensors").items() if "lora_A" in key}
    assert ranks <= {1, 2, 3, 4}


def test_a_strength_too_small_for_any_number_is_zero_and_takes_no_time() -> None:
    assert with_strength("a.safetensors:1e-999999999") == ("a.safetensors", Fraction(0))


def test_a_cap_stops_a_rule_and_says_what_it_wanted(tmp_path: Path) -> None:
    """Four equal singular values: 95 % of the energy needs all four."""
    down, up = torch.eye(4, 64), torch.eye(64, 4)
    name = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors")
    options = ("a.safetensors", "-o", "b.safetensors", "--rank-thresh", "0.95", "--rank-max", "3")
    ran = mergetool("lora", "resize", *options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "1 stopped by --rank-max, which would have to be 4" in " ".join(ran.out.split())
    assert load_file(tmp_path / "b.safetensors")[f"{name}.lora_A.weight"].shape == (3, 64)


@pytest.mark.parametrize(("options", "rank"), [(["--rank-max", "2"], 2), (["--budget", "100KB", "--rank-max", "2"], 2)])
def test_a_cap_holds_alone_and_beside_a_budget(tmp_path: Path, options: list[str], rank: int) -> None:
    name = "diffusion_model.layers.0.attention.to_q"
    factors = {f"{name}.lora_A.weight": torch.randn(4, 64), f"{name}.lora_B.weight": torch.randn(64, 4)}
    save_file(factors, tmp_path / "a.safetensors")
    ran = mergetool("lora", "resize", "a.safetensors", "-o", "b.safetensors", *options, cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert load_file(tmp_path / "b.safetensors")[f"{name}.lora_A.weight"].shape == (rank, 64)


@pytest.mark.parametrize("options", [["--rank", "2", "--rank-max", "4"], ["--rank-thresh", "0.9", "--rank-max", "0"]])
def test_a_cap_that_means_nothing_is_refused(tmp_path: Path, options: list[str]) -> None:
    name = "diffusion_model.layers.0.attention.to_q"
    save_file({f"{name}.lora_{x}.weight": torch.eye(4) for x in "AB"}, tmp_path / "a.safetensors")
    ran = mergetool("lora", "resize", "a.safetensors", "-o", "b.safetensors", *options, cwd=tmp_path)
    assert (ran.code, "--rank-max" in ran.err) == (2, True), ran.err


def test_a_model_makes_loras_of_an_unknown_family_in_two_spellings_add_up(tmp_path: Path) -> None:
    save_file({"double_layers.0.attn.w1q.weight": torch.zeros(8, 8)}, tmp_path / "m.safetensors")
    one, other = torch.eye(1, 8), torch.eye(8, 1)
    save_file({f"lora_unet_double_layers_0_attn_w1q.lora_{n}.weight": t for n, t in (("down", one), ("up", other))},
              tmp_path / "a.safetensors")  # fmt: skip
    save_file({f"diffusion_model.double_layers.0.attn.w1q.lora_{n}.weight": t for n, t in (("A", one), ("B", other))},
              tmp_path / "b.safetensors")  # fmt: skip
    command = ("lora", "merge", "a.safetensors", "b.safetensors", "-o", "c.safetensors", "--rank", "1")
    ran = mergetool(*command, cwd=tmp_path)
    assert (ran.code, "--model" in ran.err) == (65, True), ran.err
    ran = mergetool(*command, "--model", "m.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    written = load_file(tmp_path / "c.safetensors")
    scale = float(written["lora_unet_double_layers_0_attn_w1q.alpha"])
    product = (
        written["lora_unet_double_layers_0_attn_w1q.lora_up.weight"]
        @ written["lora_unet_double_layers_0_attn_w1q.lora_down.weight"]
    )
    torch.testing.assert_close(scale * product, 2 * other @ one)


def test_keys_of_a_text_encoder_are_named_when_they_do_not_come_along(tmp_path: Path) -> None:
    name = "lora_unet_layers_0_attention_to_q"
    tensors = {f"{n}.lora_{x}.weight": torch.eye(4) for n in (name, "lora_te1_x") for x in ("up", "down")}
    save_file(tensors, tmp_path / "a.safetensors")
    ran = mergetool("lora", "merge", "a.safetensors:2", "-o", "b.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert "2 keys of a.safetensors are for a text encoder and are left aside" in " ".join(ran.out.split())


def test_subtract_is_merge_with_a_strength_of_minus_one(tmp_path: Path) -> None:
    make(tmp_path, a="bare", b="LoHa")
    ran = mergetool("lora", "subtract", "a.safetensors", "b.safetensors", "-o", "one.safetensors", cwd=tmp_path)
    assert ran.code == 0, ran.err
    mergetool("lora", "merge", "a.safetensors", "b.safetensors:-1", "-o", "two.safetensors", cwd=tmp_path)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert "subtract" not in mergetool("lora", "--help", cwd=tmp_path).out


def test_a_threshold_with_a_comma_is_refused_with_the_number(tmp_path: Path) -> None:
    make(tmp_path, a="bare")
    ran = mergetool("lora", "resize", "a.safetensors", "-o", "b.safetensors", "--rank-thresh", "0,5", cwd=tmp_path)
    assert (ran.code, "write 0.5" in ran.err) == (2, True), ran.err


def test_a_conversion_that_is_only_planned_writes_nothing(tmp_path: Path) -> None:
    make(tmp_path, a="bare")
    ran = mergetool("lora", "convert", "a.safetensors", "--key-format", "peft", "--dry-run", "--json", cwd=tmp_path)
    assert (ran.json["modules"], ran.json["lossless"], ran.json["output"]) == (7, True, None)
    assert [path.name for path in tmp_path.glob("*") if path.is_file()] == ["a.safetensors"]


def test_the_functions_write_the_bytes_of_the_commands(tmp_path: Path) -> None:
    make(tmp_path, a="bare", b="LoHa")
    for word, call, files, options in (
        ("resize", mergetool_api.lora_resize, ["a"], {"rank": 1}),
        ("merge", mergetool_api.lora_merge, [["a", "b"]], {}),
        ("orthogonal", mergetool_api.lora_orthogonal, ["a", "b"], {}),
        ("common", mergetool_api.lora_common, ["a", "b"], {}),
    ):
        names = [tmp_path / f"{name}.safetensors" for name in (files[0] if word == "merge" else files)]
        said = [f"--{name}={value}" for name, value in options.items()]
        ran = mergetool("lora", word, *names, "-o", f"{word}.safetensors", *said, cwd=tmp_path)
        assert ran.code == 0, ran.err
        given = [[str(name) for name in names]] if word == "merge" else names
        done = call(*given, tmp_path / "api.safetensors", overwrite=True, **options)  # type: ignore[operator]
        assert done.output.read_bytes() == (tmp_path / f"{word}.safetensors").read_bytes()
        assert done.combined.modules
