"""The commands, run as a user runs them, on real files."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import cast

import pytest
import torch
import typer.core
import typer.main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergetool.cli.main import app
from tests.cli.run import installed, mergetool
from tests.families import checkpoint

MERGE = "alkahest + 20 * (turbo - deturbo)"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three registered fine-tunes."""
    folder = tmp_path_factory.mktemp("family")
    for seed, name in enumerate(["alkahest", "turbo", "deturbo"]):
        checkpoint(folder / f"{name}.safetensors", variant=seed)
        assert mergetool("models", "add", name, f"{name}.safetensors", cwd=folder).code == 0
    return folder


def test_help_never_imports_torch_numpy_or_the_hub() -> None:
    code = (
        "import sys; sys.argv = ['mergetool', '--help']\n"
        "from mergetool.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'huggingface_hub', 'diffusers', 'transformers', 'pydantic', 'yaml', 'rich'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\n"), done.stdout[-200:]


def test_a_command_imports_no_other_and_names_are_looked_up_without_numpy(family: Path) -> None:
    """compare reads ahead from then on; numpy, typer's parameters of all commands and their modules took longer than the reading of half a gigabyte."""
    code = (
        "import sys; sys.argv = ['mergetool', 'models', 'list']\n"
        "from mergetool.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "commands = {name.split('.')[2] for name in sys.modules if name.startswith('mergetool.cli.')} - {'main', 'console', 'lazily', 'parameters', 'epilogs', 'page', 'refusals'}\n"
        "print('imported:', sorted(commands), 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=family)
    assert done.stdout.endswith("imported: ['models'] False\n"), done.stdout[-200:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "alkahest.safetensors", "--hash"],
        ["compare", "alkahest", "turbo", "--json"],
        ["merge", MERGE, "-o", "out.safetensors", "--protect", "refiner"],
        ["merge", MERGE, "-o", "out.safetensors", "--quant", "fp8-scaled", "--measure", "all"],
        ["merge", MERGE, "-o", "out.safetensors", "--dtype", "fp8_e4m3", "--dry-run"],
        ["convert", "turbo", "-o", "out.safetensors", "--dtype", "fp32", "--dry-run"],
    ],
)
def test_what_can_do_without_torch_never_imports_it(arguments: list[str], family: Path) -> None:
    """It takes a second to import: where no kernel was compiled, comparing and merging do need it."""
    code = (
        f"import sys; sys.argv = ['mergetool', *{arguments}]\n"
        "from mergetool.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=family,
                          env={**os.environ, "MERGETOOL_CONFIG_DIR": str(family / "config")})  # fmt: skip
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", MERGE, "-o", "parity.safetensors", "--overwrite", "--protect", "refiner"),
        ("merge", "alkahest + turbo", "-o", "none.safetensors"),
        ("inspect", "turbo", "--hash"),
        ("inspect", "turbo", "--hsah"),
    ],
)
def test_a_forked_run_is_what_the_installed_program_does(arguments: tuple[str, ...], family: Path) -> None:
    """Most tests of commands rely on it."""
    forked, real = mergetool(*arguments, cwd=family), installed(*arguments, cwd=family)
    timeless = [(ran.code, re.sub(r"[\d.]+ (s|MB/s|GB/s)\b", "", ran.out), ran.err) for ran in (forked, real)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("command", ["inspect", "merge", "diff", "models"])
def test_every_command_has_help(command: str, family: Path) -> None:
    ran = mergetool(command, "--help", cwd=family)
    assert ran.code == 0
    assert "Usage:" in ran.out
    assert all(option in ran.out for option in (["--json"] if command != "models" else ["add", "list", "remove"]))


@pytest.mark.parametrize("command", ["bake", "resize", "merge", "orthogonal", "common", "interference"])
def test_every_lora_command_is_listed_and_has_help_with_examples(command: str, family: Path) -> None:
    assert command in mergetool("lora", "--help", cwd=family).out.split()
    ran = mergetool("lora", command, "--help", cwd=family)
    assert ran.code == 0
    assert f"mergetool lora {command} " in ran.out.split("Examples:")[1]
    assert all(option in ran.out for option in ("--json", "--no-progress", "--verbose"))


def test_every_command_is_listed_in_the_help(family: Path) -> None:
    out = mergetool("--help", cwd=family).out
    built = cast(typer.core.TyperGroup, typer.main.get_command(app))
    shown = {name for name, command in built.commands.items() if not command.hidden}
    assert shown == {
        "inspect",
        "merge",
        "compare",
        "convert",
        "diff",
        "lora",
        "sample",
        "verify",
        "demo",
        "models",
        "methods",
        "doctor",
        "help",
        "version",
    }
    assert shown <= set(out.split())


def test_the_version_is_the_projects(family: Path) -> None:
    version = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    assert mergetool("--version", cwd=family).out.splitlines()[0] == f"mergetool {version}"


def test_merge_writes_the_output_and_says_what_it_did(family: Path, tmp_path: Path) -> None:
    ran = mergetool("merge", MERGE, "--protect", "refiner", "-o", tmp_path / "out.safetensors", cwd=family)
    assert ran.code == 0, ran.err
    assert "41 merged · 24 protected: refiner" in ran.out
    assert "reads" in ran.out
    assert ran.err == ""
    with safe_open(tmp_path / "out.safetensors", "np") as opened:
        assert len(list(opened.keys())) == 65


def test_merge_json_is_one_object_with_the_whole_plan(family: Path, tmp_path: Path) -> None:
    ran = mergetool("merge", MERGE, "--protect", "refiner", "-o", tmp_path / "out.safetensors", "--json", cwd=family)
    assert ran.json["actions"] == {"merged": 41, "protected: refiner": 24}
    assert ran.json["bytes_written"] == (tmp_path / "out.safetensors").stat().st_size
    assert len(ran.json["tensors"]) == 65


def test_merge_says_what_rounding_took_and_which_rounding_keeps_it(family: Path, tmp_path: Path) -> None:
    small = "alkahest + 0.01 * (turbo - deturbo)"
    near = mergetool("merge", small, "-o", tmp_path / "near.safetensors", cwd=family)
    assert re.search(
        r"delta   rounding to bf16 lost \d\d\.\d % of the change; --rounding stochastic keeps it", near.out
    )
    kept = mergetool("merge", small, "--rounding", "stochastic", "-o", tmp_path / "kept.safetensors", cwd=family)
    assert re.search(r"delta   stochastic rounding to bf16 kept [\d.]+ % of the change", kept.out)
    shares = re.search(r"^ +ffn +[\d.]+ k +([\d.]+) % +([\d.]+) % +([\d.]+) %$", kept.out, re.MULTILINE)
    assert shares
    assert 95 < float(shares[3]) < 105


def test_merge_json_has_the_figures_of_every_group_and_tensor(family: Path, tmp_path: Path) -> None:
    ran = mergetool("merge", MERGE, "--protect", "refiner", "-o", tmp_path / "out.safetensors", "--json", cwd=family)
    rounding = ran.json["rounding"]
    assert (rounding["mode"], rounding["seed"]) == ("nearest", 0)
    assert rounding["total"]["moved"] == sum(figures["moved"] for figures in rounding["tensors"].values())
    assert len(rounding["tensors"]) == 41
    assert {"ffn", "attention", "layers"} <= set(rounding["groups"])
    assert 0.9 < rounding["groups"]["ffn"]["projection"] < 1.1


def test_dry_run_lists_every_tensor_and_writes_nothing(family: Path) -> None:
    before = sorted(family.iterdir())
    ran = mergetool("merge", MERGE, "--protect", "refiner", "--dry-run", cwd=family)
    assert ran.code == 0
    assert "layers.1.attention.qkv.weight  [192, 64] bf16  merged" in ran.out
    assert "noise_refiner.0.attention.qkv.weight  [192, 64] bf16  protected: refiner" in ran.out
    assert sorted(family.iterdir()) == before


def test_a_second_run_gives_the_same_bytes(family: Path, tmp_path: Path) -> None:
    digests = set()
    for name, hash_seed, extra in (("x", "0", []), ("y", "1", ["--threads", "1"]), ("z", "2", ["--reader", "pread"])):
        out = tmp_path / f"{name}.safetensors"
        assert (
            mergetool("merge", MERGE, "-o", out, *extra, cwd=family, PYTHONHASHSEED=hash_seed, TZ="Asia/Tokyo").code
            == 0
        )
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_diff_writes_variant_minus_base_in_the_working_folder(family: Path) -> None:
    ran = mergetool("diff", "--base", "alkahest", "--variant", "turbo", "--exclude", "refiner", cwd=family)
    assert ran.code == 0, ran.err
    assert "diffusers 0.36, 0.38, 0.39, 0.40 and 0.42.1: whole" in ran.out
    assert "ComfyUI 0.30: whole" in ran.out
    with safe_open(family / "turbo-minus-alkahest.safetensors", "np") as opened:
        keys = list(opened.keys())
    assert keys
    assert not any("refiner" in key for key in keys)
    (family / "turbo-minus-alkahest.safetensors").unlink()


def test_inspect_json_counts_parameters_and_groups(family: Path) -> None:
    ran = mergetool("inspect", "alkahest", "--json", cwd=family)
    assert (ran.json["family"], ran.json["proved"]) == ("Z-Image", True)
    assert ran.json["tensors"] == 65
    assert ran.json["groups"]["refiner"]["tensors"] == 24


def test_inspect_says_that_a_named_family_is_not_proved(tmp_path: Path) -> None:
    save_file(
        {"txtfusion.projector.weight": torch.zeros(1, 12), "blocks.0.attn.wq.weight": torch.zeros(8, 8)},
        tmp_path / "k.safetensors",
    )
    ran = mergetool("inspect", "k.safetensors", cwd=tmp_path)
    assert "Krea 2, plain layout" in ran.out
    assert "family  known by name only" in ran.out
    told = mergetool("inspect", "k.safetensors", "--json", cwd=tmp_path).json
    assert (told["family"], told["proved"]) == ("Krea 2", False)


def test_inspect_hash_is_the_files_sha256(family: Path) -> None:
    expected = hashlib.sha256((family / "alkahest.safetensors").read_bytes()).hexdigest()
    ran = mergetool("inspect", "alkahest", "--hash", "--json", cwd=family)
    assert ran.json["sha256"] == {"alkahest.safetensors": expected}
    assert ran.json["autov2"] == {"alkahest.safetensors": expected[:10].upper()}


def test_models_remembers_and_forgets_names(tmp_path: Path) -> None:
    checkpoint(tmp_path / "x.safetensors")
    assert mergetool("models", "add", "mine", "x.safetensors", cwd=tmp_path).code == 0
    names = {entry["name"] for entry in mergetool("models", "list", "--json", cwd=tmp_path).json["models"]}
    assert {"mine", "z-image", "z-image-turbo"} <= names
    assert mergetool("models", "remove", "mine", cwd=tmp_path).code == 0
    assert mergetool("inspect", "mine", cwd=tmp_path).code == 66


def test_output_into_a_closed_pipe_leaves_no_traceback(family: Path) -> None:
    program = Path(sys.executable).with_name("mergetool")
    command = f"'{program}' merge '{MERGE}' --dry-run | head -1"
    environment = {"MERGETOOL_CONFIG_DIR": str(family / "config"), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=family, env=environment, capture_output=True, text=True, check=True
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_inspect_names_a_quantised_container_instead_of_refusing_it(tmp_path: Path) -> None:
    checkpoint(tmp_path / "x.safetensors")
    tensors = load_file(tmp_path / "x.safetensors")
    tensors["layers.0.feed_forward.w1.wscales"] = torch.zeros(2)
    save_file(tensors, tmp_path / "x.safetensors")
    ran = mergetool("inspect", "x.safetensors", cwd=tmp_path)
    assert ran.code == 0
    assert "SVDQuant" in ran.out
    assert "use the unquantised original" in ran.out


DIFF = ("diff", "--base", "alkahest", "--variant", "turbo")


def test_diff_help_defines_every_rule(family: Path) -> None:
    out = mergetool("diff", "--help", cwd=family, COLUMNS="160").out
    for option in ("--rule", "--budget", "--spectra"):
        assert option in out
    for words in (
        "energy  the fewest r",
        "fro     ",
        "sum     ",
        "ratio   all s > t * s1",
        "abs     all s > t",
        "knee    ",
    ):
        assert words in out


def test_a_budget_is_kept_and_what_it_leaves_out_is_named(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    ran = mergetool(*DIFF, "--budget", "9kB", "-o", out, cwd=family)
    assert ran.code == 0, ran.err
    size = out.stat().st_size
    assert size <= 9000
    assert re.search(rf"budget  {size:,} of 9,000 bytes · residual \d+\.\d % of all matrices together", ran.out)
    assert re.search(r"\d+ got rank 0, [\d.]+ % of the matrices' difference: \S+", ran.out)


def test_a_second_diff_takes_its_directions_from_the_side_file(family: Path, tmp_path: Path) -> None:
    side = tmp_path / "side.safetensors"
    first = mergetool(*DIFF, "--spectra", side, "-o", tmp_path / "a.safetensors", cwd=family)
    assert re.search(r"spectra \S+  [\d.]+ kB  0 known · \d+ matrices searched and added", first.out), first.err
    second = mergetool(
        *DIFF, "--spectra", side, "--budget", "30kB", "--json", "-o", tmp_path / "b.safetensors", cwd=family
    )
    assert second.json["spectra"] == {"file": str(side), "searched": []}
    assert second.json["ranks"] == {"rank": 0, "budget": 30000, "rule": None, "rank_thresh": None, "rank_max": 0}


def test_a_rule_is_in_the_metadata_and_in_the_json(family: Path, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    ran = mergetool(*DIFF, "--rule", "ratio", "--rank-thresh", 0.3, "--json", "-o", out, cwd=family)
    assert (ran.json["ranks"]["rule"], ran.json["ranks"]["rank_thresh"]) == ("ratio", 0.3)
    with safe_open(out, "np") as opened:
        recipe = opened.metadata()["mergetool.diff"]
    assert '"rule": "ratio"' in recipe
    assert '"rank_thresh": 0.3' in recipe


def test_a_threshold_that_bf16_cannot_hold_is_said(family: Path, tmp_path: Path) -> None:
    ran = mergetool(
        *DIFF, "--rank-thresh", 1, "--rank-max", 0, "-o", tmp_path / "lora.safetensors", "--no-progress", cwd=family
    )
    assert re.search(r"\d+ below the threshold as stored, down to 0\.99999\d+ \(\S+\): bf16 rounds away more", ran.out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "mean"], '--rule is "mean", but has to be one of energy, fro, sum, ratio, abs, knee'),
        (["--rule", "ratio"], "--rule ratio needs --rank-thresh"),
        (["--rule", "abs", "--rank-thresh", 100], "no singular value is above 100"),
        (["--rule", "ratio", "--rank-thresh", 2], "0 < t < 1"),
        (["--rule", "knee", "--rank-thresh", 0.5], "--rule knee has no threshold"),
        (["--budget", "1MB", "--rank-thresh", 0.5], "--budget has no threshold"),
        (["--budget", "1MB", "--rank", 4], "--budget chooses the ranks by itself"),
        (["--rank", 4, "--rule", "sum"], "leave out --rule"),
        (["--budget", "700"], "--budget is 700 bytes, but the smallest LoRA"),
        (["--budget", "much"], "has to be a size above 0"),
    ],
)
def test_choices_of_ranks_that_cannot_be_meant_are_refused(
    family: Path, tmp_path: Path, options: list[object], words: str
) -> None:
    ran = mergetool(*DIFF, *options, "-o", tmp_path / "lora.safetensors", cwd=family)
    assert (ran.code, ran.out.count("done")) == (2, 0)
    assert words in ran.err
    assert not (tmp_path / "lora.safetensors").exists()
