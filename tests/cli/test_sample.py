"""``mergetool sample`` as a user runs it, on the embedded models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mergetool.lab import checker
from mergetool.verification.images import psnr
from tests.cli.run import mergetool

PROMPT = "a blue circle on a gold background"
QUICK = ("--steps", 2, "--refine-steps", 2)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_two_stages_make_one_picture_that_says_how_it_was_made(pipelines: Path, tmp_path: Path) -> None:
    ran = mergetool(
        "sample",
        PROMPT,
        "--base",
        pipelines / "base",
        "--refiner",
        pipelines / "turbo",
        *QUICK,
        "--seed",
        7,
        cwd=tmp_path,
    )
    assert ran.code == 0, ran.err
    assert "base: 2 evaluations from sigma 1.000, shift 6, guidance 3 (cfg 4), euler, simple" in ran.out
    assert "turbo: 2 evaluations from sigma 0.353, shift 3" in ran.out
    with Image.open(tmp_path / "sample.png") as image:
        assert image.size == (64, 64)
        found = json.loads(image.info["mergetool"])
        assert image.info["parameters"].startswith(PROMPT)
    assert (found["seed"], found["refine_seed"], found["second"]["strength_as"]) == (7, 8, "comfyui")
    assert found["second"]["evaluations"] == 2


def test_the_same_seed_makes_the_same_picture_and_another_does_not(pipelines: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        ran = mergetool(
            "sample",
            PROMPT,
            "--base",
            pipelines / "turbo",
            "--steps",
            2,
            "--seed",
            seed,
            "-o",
            f"{name}.png",
            cwd=tmp_path,
        )
        assert ran.code == 0, ran.err
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert not np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png"))


def test_a_sweep_makes_a_folder_with_a_sheet_and_every_parameter(pipelines: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"# two\n{PROMPT}\n\na red cross on a white background\n")
    ran = mergetool(
        "sample", "--prompts", "prompts.txt", "--seeds", "1-2", "--base", pipelines / "base", "--refiner", pipelines / "turbo", *QUICK,
        "--strength", "0.15,0.6", "-o", "sheet", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    record = json.loads((tmp_path / "sheet" / "pictures.json").read_text())
    assert len(record) == len(ran.json["pictures"]) == 2 * 2 * 3
    assert {path.name for path in (tmp_path / "sheet").iterdir()} == {
        "sheet.png",
        "pictures.json",
        *(one["file"] for one in record),
    }
    assert [one["second"] and one["second"]["strength"] for one in record[:3]] == [None, 0.15, 0.6]


def test_an_init_image_is_refined_at_its_own_size(pipelines: Path, tmp_path: Path) -> None:
    Image.new("RGB", (96, 48), (40, 90, 200)).save(tmp_path / "in.png")
    ran = mergetool(
        "sample", PROMPT, "--init-image", "in.png", "--refiner", pipelines / "turbo", "-o", "out.png", cwd=tmp_path
    )
    assert ran.code == 0, ran.err
    assert pixels(tmp_path / "out.png").shape == (48, 96, 3)


def test_pixel_handoff_differs_from_latent_handoff_by_a_vae_round_trip(pipelines: Path, tmp_path: Path) -> None:
    for way in ("latent", "pixels"):
        ran = mergetool(
            "sample", PROMPT, "--base", pipelines / "base", "--refiner", pipelines / "turbo", *QUICK, "--handoff", way, "-o", f"{way}.png", cwd=tmp_path,
        )  # fmt: skip
        assert ran.code == 0, ran.err
    assert not np.array_equal(pixels(tmp_path / "latent.png"), pixels(tmp_path / "pixels.png"))


def test_a_fresh_merge_samples(pipelines: Path, tmp_path: Path) -> None:
    made = mergetool(
        "merge",
        f"0.5 * '{pipelines}/base' + 0.5 * '{pipelines}/turbo'",
        "--protect",
        "refiner",
        "--from",
        pipelines / "base",
        "-o",
        "m.safetensors",
        cwd=tmp_path,
    )
    assert made.code == 0, made.err
    ran = mergetool(
        "sample",
        PROMPT,
        "--base",
        "m.safetensors",
        "--pipeline",
        pipelines / "base",
        "--steps",
        2,
        "-o",
        "m.png",
        cwd=tmp_path,
    )
    assert ran.code == 0, ran.err


def test_an_option_without_effect_is_told_and_recorded(pipelines: Path, tmp_path: Path) -> None:
    line = (
        "sample",
        PROMPT,
        "--base",
        pipelines / "turbo",
        "--steps",
        1,
        "--cfg",
        1,
        "--negative",
        "red",
        "--refine-steps",
        3,
    )
    ran = mergetool(*line, cwd=tmp_path)
    told = [text.removeprefix("note").strip() for text in ran.out.splitlines() if text.startswith("note")]
    assert told == [
        "--refine-steps has no effect: there is no --refiner.",
        "--negative has no effect: no stage has guidance (cfg is 1).",
    ]
    assert mergetool(*line, "--json", "--overwrite", cwd=tmp_path).json["notes"] == told


def test_a_preset_draws_with_its_settings_and_records_them(pipelines: Path, tmp_path: Path) -> None:
    ran = mergetool(
        "sample", PROMPT, "--base", pipelines / "turbo", "--preset", "comfyui-turbo", "--json", cwd=tmp_path
    )
    (made,) = ran.json["pictures"]
    found = {
        name: made["first"][name] for name in ("steps", "guidance", "shift", "sampler", "scheduler", "evaluations")
    }
    assert found == {"steps": 8, "guidance": 0.0, "shift": 3.0, "sampler": "res_multistep", "scheduler": "simple", "evaluations": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--base", "lab.none"], 66, "is no embedded model; choose one of"),
        ([], 2, "the request names no model; name one with --base, or with --init-image and --refiner"),
        (["--base", "BASE", "--size", "63x64"], 2, "the nearest is 64x64"),
        (["--base", "BASE", "--size", "large"], 2, "WIDTHxHEIGHT"),
        (["--base", "BASE", "--refiner", "TURBO", "--strength", "2"], 2, "above 0 and at most 1"),
        (["--base", "BASE", "--guidance", "3", "--cfg", "4"], 2, "give one of them"),
        (["--base", "BASE", "--vae", "nowhere"], 66, "the VAE is missing"),
        (["--base", "BASE", "--lora", "nowhere.safetensors"], 66, "nowhere.safetensors"),
        (["--base", "BASE", "--lora", "other.safetensors"], 65, "LoRA for another model"),
        (["--init-image", "text.png", "--refiner", "TURBO"], 65, "not a picture"),
        (["--base", "BASE", "-o", "there.png"], 73, "exists"),
        (["--base", "BASE", "-o", "no/where.png"], 73, "does not exist"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_one_sentence_and_no_picture(
    pipelines: Path, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "there.png").write_text("mine")
    pair = {"lora_A": torch.zeros(2, 8), "lora_B": torch.zeros(8, 2)}
    save_file({f"diffusion_model.x.{key}.weight": value for key, value in pair.items()}, tmp_path / "other.safetensors")
    places = {"BASE": pipelines / "base", "TURBO": pipelines / "turbo"}
    ran = mergetool("sample", PROMPT, "--steps", 1, *(places.get(text, text) for text in options), cwd=tmp_path)
    assert (ran.code, words in ran.err) == (code, True), ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert (tmp_path / "there.png").read_text() == "mine"
    assert not (tmp_path / "sample.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [("--layout", "comfyui"), ("--dtype", "fp8_e4m3"), ("--layout", "diffusers", "--shard-size", "1MB"), ()],
    ids=["a ComfyUI file", "an FP8 file", "a folder of shards", "a merge"],
)
def test_every_container_of_turbo_draws_the_prompt(arguments: tuple[str, ...], tmp_path: Path) -> None:
    expression = "1*lab.turbo" if arguments else "lab.turbo + 0.1*(lab.hollow - lab.turbo)"
    target = "out" if "--shard-size" in arguments else "out.safetensors"
    merged = mergetool("merge", expression, *arguments, "-o", target, cwd=tmp_path)
    assert merged.code == 0, merged.err
    quick = ("--steps", 4, "--guidance", 0, "--shift", 3)
    ran = mergetool("sample", PROMPT, "--base", target, *quick, "--seed", 5, "-o", "picture.png", cwd=tmp_path)
    assert ran.code == 0, ran.err
    assert checker.adherent(pixels(tmp_path / "picture.png"), PROMPT)


def test_a_difference_lora_at_strength_one_draws_what_the_variant_draws(tmp_path: Path) -> None:
    # fmt: off
    made = mergetool(
        "diff", "--base", "lab.alkahest", "--variant", "lab.turbo", "--rank-thresh", 0.999, "--rank-max", 0,
        "-o", "lora.safetensors", cwd=tmp_path,
    )
    assert made.code == 0, made.err
    quick = ("--steps", 4, "--guidance", 0, "--shift", 3, "--seed", 5)
    for name, model in (("variant", ("lab.turbo",)), ("0", ("lab.alkahest", "--lora", "lora.safetensors:0")),
                        ("1", ("lab.alkahest", "--lora", "lora.safetensors:1"))):
        ran = mergetool("sample", PROMPT, "--base", *model, *quick, "-o", f"{name}.png", cwd=tmp_path)
        assert ran.code == 0, ran.err
    # fmt: on
    near, far = (psnr(pixels(tmp_path / f"{name}.png"), pixels(tmp_path / "variant.png")) for name in ("1", "0"))
    assert near > far + 5  # 6.0 here: all but a quarter of the squared distance is gone
    assert near > 24
