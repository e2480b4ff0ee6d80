"""What is asked of the sampler, and what becomes of it before a model is loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool import models
from mergetool.engine import job
from mergetool.errors import MergetoolError, UsageError
from mergetool.options.merging import MergeOptions
from mergetool.options.pictures import PicturesOptions, SampleOptions
from mergetool.options.sampling import PRESETS
from mergetool.sampler import settings
from mergetool.sampler.settings import prepare
from mergetool.verification.looks import plan

PROMPT = "a blue circle on a gold background"


def first(**options: Any) -> Any:
    return settings.stage(SampleOptions(base="lab.base", **options).first)


def second(**options: Any) -> Any:
    return settings.refinements(SampleOptions(refiner="lab.turbo", **options).second)


@pytest.mark.parametrize(("cfg", "guidance"), [(4.0, 3.0), (1.0, 0.0), (0.5, -0.5), (0.0, -1.0), (-3.0, -4.0)])
def test_cfg_is_guidance_and_one(cfg: float, guidance: float) -> None:
    assert first(cfg=cfg).guidance == guidance


@pytest.mark.parametrize("prefix", ["", "refine_"])
@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("cfg", float("nan"), "a number from -10000 up to 10000"),
        ("cfg", float("inf"), "a number from -10000 up to 10000"),
        ("guidance", float("nan"), "0 \\(none\\) or more"),
        ("guidance", -0.5, "cfg` below 1"),
        ("steps", 0, "a whole number from 1 to 10000"),
        ("shift", 0.0, "a number above 0"),
        ("shift", -1.0, "a number above 0"),
        ("sampler", "heun", "one of euler, res_multistep, dpmpp_2m_sde"),
        ("scheduler", "karras", "one of simple"),
        ("preset", "sdxl", "one of comfyui-base, comfyui-turbo, comfyui-refine"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_the_name_of_its_option(
    prefix: str, option: str, value: Any, words: str
) -> None:
    with pytest.raises(UsageError, match=f"`{prefix}{option}` is .* but has to be .*{words}"):
        SampleOptions(**{f"{prefix}{option}": value})


def test_guidance_is_said_in_one_way() -> None:
    with pytest.raises(UsageError, match="`refine_guidance` and `refine_cfg` set the same thing; give one"):
        SampleOptions(refine_guidance=3.0, refine_cfg=4.0)


def test_a_preset_is_a_default_that_other_options_change() -> None:
    found = first(preset="comfyui-base", steps=7, cfg=2.0)
    assert (found.steps, found.guidance, found.shift, found.sampler) == (7, 1.0, 3.0, "res_multistep")


def test_the_preset_of_the_refiner_brings_its_strength() -> None:
    (found,) = second(refine_preset="comfyui-refine")
    assert (found.steps, found.strength, found.sampler, found.scheduler) == (5, 0.33, "dpmpp_2m_sde", "beta")


def test_every_preset_runs() -> None:
    assert [first(preset=name).evaluations for name in PRESETS] == [preset.steps for preset in PRESETS.values()]


def test_diffusers_meaning_of_strength_comes_with_diffusers_levels() -> None:
    meanings = ((None, "simple"), ("comfyui", "simple"), ("diffusers", "diffusers"))
    for meaning, scheduler in meanings:
        (found,) = second(strength_as=meaning)
        assert found.scheduler == scheduler


def test_sample_and_verify_have_the_same_defaults(tmp_path: Path) -> None:
    with job.open_merge("lab.base + 0.1*(lab.alkahest - lab.base)", MergeOptions()) as made:
        job.run_merge(made, tmp_path / "m.safetensors")
    request = prepare(SampleOptions(PROMPT, base="lab.base", refiner="lab.turbo")).request
    _, look = plan(str(tmp_path / "m.safetensors"), "lab.base", PicturesOptions(), patient=True)
    assert request.first is not None
    for one, other in ((request.first, look.first), (request.refinements[0], look.refinements[0])):
        for name in ("steps", "guidance", "shift", "sampler", "scheduler"):
            assert getattr(one, name) == getattr(other, name)


@pytest.fixture
def turbo(tmp_path: Path) -> str:
    """Turbo as one file, which has no scheduler beside it."""
    with job.open_merge("1*lab.turbo", MergeOptions(layout="comfyui")) as made:
        job.run_merge(made, tmp_path / "turbo.safetensors")
    return str(tmp_path / "turbo.safetensors")


def test_a_single_file_has_the_shift_of_the_named_pipeline_else_comfyuis(turbo: str) -> None:
    shifts = [settings.own_shift(turbo, pipeline) for pipeline in (None, "lab.turbo", "lab.base")]
    assert shifts == [3.0, 3.0, 6.0]


def test_a_model_with_a_scheduler_keeps_its_own_shift() -> None:
    assert settings.own_shift("lab.base", "lab.turbo") == 6.0


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({}, []),
        ({"negative": "a red one"}, []),
        ({"negative": "a red one", "cfg": 1.0}, ["`negative` has no effect"]),
        ({"negative": "a red one", "cfg": 0.5}, []),
        ({"strength": 0.2, "refine_steps": 8}, ["`refine_steps` has no", "`strength` has no"]),
        ({"refine_cfg": 2.0, "refine_sampler": "euler"}, ["`refine_cfg` has no", "`refine_sampler` has no"]),
        ({"refine_loras": {"a.safetensors": 1}}, ["`refine_loras` has no effect: there is no `refiner`"]),
        ({"refine_seed": 4}, ["`refine_seed` has no effect: there is no `refiner`"]),
        ({"handoff": "latent"}, ["`handoff` has no effect: there is one stage"]),
    ],
)
def test_what_is_asked_and_has_no_effect_is_told(options: dict[str, Any], sentences: list[str]) -> None:
    notes = prepare(SampleOptions(PROMPT, base="lab.base", **options)).notes
    assert len(notes) == len(sentences)
    assert all(wanted in note for wanted, note in zip(sentences, notes, strict=True))


def strengths(*texts: str) -> list[tuple[str, float]]:
    return [(str(lora.path), lora.strength) for lora in first(loras=list(texts)).loras]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors", ("a.safetensors", 1.0)),
        (r"C:\loras\x.safetensors", (r"C:\loras\x.safetensors", 1.0)),
        (r"C:\loras\x.safetensors:0.8", (r"C:\loras\x.safetensors", 0.8)),
        ("C:/x.safetensors:-2", ("C:/x.safetensors", -2.0)),
        ("style:v2.safetensors", ("style:v2.safetensors", 1.0)),
        ("style:v2.safetensors:1e-1", ("style:v2.safetensors", 0.1)),
        ('"my style.safetensors":0.5', ("my style.safetensors", 0.5)),
        ("~/a.safetensors:0.5", (str(Path.home() / "a.safetensors"), 0.5)),
    ],
)
def test_a_colon_belongs_to_the_path_unless_a_number_follows(text: str, found: tuple[str, float]) -> None:
    assert strengths(text) == [found]


def test_a_file_whose_name_ends_like_a_strength_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "style:2").touch()
    assert strengths("style:2") == [("style:2", 1.0)]
    (tmp_path / "style").touch()
    with pytest.raises(UsageError, match='write "style:2:1"'):
        strengths("style:2")


def test_a_strength_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(UsageError, match=r'no LoRA with a strength; write "a\.safetensors:0\.8"'):
        strengths("a.safetensors:strong")


@pytest.mark.parametrize("strength", ["nan", "inf", "-inf"])
def test_a_strength_that_is_not_finite_is_refused(strength: str) -> None:
    with pytest.raises(UsageError, match="finite"):
        strengths(f"a.safetensors:{strength}")


@pytest.mark.parametrize(
    ("given", "found"),
    [("3", (3,)), ("1-3,7", (1, 2, 3, 7)), (f"{2**64 - 1}", (2**64 - 1,)), (5, (5,)), ([2, 1], (2, 1)), (None, (0,))],
)
def test_seeds_are_a_number_a_list_or_a_text(given: Any, found: tuple[int, ...]) -> None:
    assert SampleOptions(seeds=given).seed_numbers == found


@pytest.mark.parametrize("given", ["", "-1", "1.5", str(2**64), "5-3", "1-99999", -1, 2**64, [], [True], [0.5]])
def test_what_is_no_seed_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"`seeds` is .* but has to be a seed"):
        SampleOptions(seeds=given)


@pytest.mark.parametrize(
    ("given", "found"),
    [("0.1, 0.15", (0.1, 0.15)), (0.123456789, (0.123456789,)), ([0.5, 1], (0.5, 1.0)), ("1", (1.0,))],
)
def test_strength_is_a_number_a_list_or_a_text(given: Any, found: tuple[float, ...]) -> None:
    assert SampleOptions(strength=given).second.strength == found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("0,5", "written with a point: 0.5"),
        ("0,1, 0,25", "written with a point: 0.1,0.25"),
        ("2", "above 0 and at most 1"),
        (0, "above 0 and at most 1"),
        ("weak", "a number above 0"),
        ([], "one number or more"),
    ],
)
def test_a_strength_that_cannot_be_meant_is_refused_with_the_right_line(given: Any, words: str) -> None:
    with pytest.raises(UsageError, match=f"`strength` is .*{words}"):
        SampleOptions(strength=given)


@pytest.mark.parametrize("given", [(64, 48), "64x48", " 64 X 48 ", "64*48", [64, 48]])
def test_a_size_is_two_numbers_or_a_text(given: Any) -> None:
    assert SampleOptions(size=given).pixels == (64, 48)


@pytest.mark.parametrize("given", ["large", "64", (64,), (64, 48, 3), 64])
def test_what_is_no_size_is_refused(given: Any) -> None:
    with pytest.raises(UsageError, match=r"`size` is .* but has to be WIDTHxHEIGHT, as in 1024x768"):
        SampleOptions(size=given)


@pytest.mark.parametrize("option", ["prompts", "text_encoder", "tokenizer", "vae", "init_image"])
def test_a_path_may_be_copied_with_its_quotes_or_begin_at_home(option: str) -> None:
    for given, found in (('"a b/c"', Path("a b/c")), ("~/c", Path.home() / "c"), (Path("c"), Path("c"))):
        assert getattr(SampleOptions(**{option: given}), option) == found


@pytest.mark.parametrize(
    ("size", "nearest"), [("70x64", "72x64"), ("1x1", "8x8"), ("63x65", "64x64"), ("1920x1080", "512x288")]
)
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(size: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=f"the nearest is {nearest}"):
        prepare(SampleOptions(PROMPT, base="lab.base", size=size))


WRONG = """
import json, sys
from mergetool.cli.main import app
for arguments in json.loads(sys.argv[1]):
    try:
        code = app(["sample", "a circle", *arguments], standalone_mode=False)
    except BaseException as ended:
        code = getattr(ended, "exit_code", getattr(ended, "code", 1))
    print("CODE", code, [name for name in ("torch", "diffusers", "transformers") if name in sys.modules])
"""


def test_what_is_wrong_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "there.png").write_text("mine")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "prompts.txt").write_bytes(b"")
    spoilt = tmp_path / "spoilt"
    shutil.copytree(models.EMBEDDED / "base", spoilt)
    for part, file in (("text_encoder", "model"), ("vae", "diffusion_pytorch_model")):
        path = spoilt / part / f"{file}.safetensors"
        weights = load_file(path)
        del weights[next(iter(weights))]
        save_file(weights, path)
    save_file({"diffusion_model.x.lora_A.weight": torch.zeros(2, 8), "diffusion_model.x.lora_B.weight": torch.zeros(8, 2)}, tmp_path / "lora.safetensors")  # fmt: skip
    base = ("--base", "lab.base")
    wrong = [
        ([], 2),
        (["--base", "lab.none"], 66),
        ([*base, "--steps", "0"], 2),
        ([*base, "--cfg", "nan"], 2),
        ([*base, "--sampler", "heun"], 2),
        ([*base, "--seed", "-1"], 2),
        ([*base, "--size", "63x64"], 2),
        ([*base, "--size", "4096x4096"], 2),
        ([*base, "--dtype", "fp8"], 2),
        ([*base, "--prompts", "prompts.txt"], 2),
        ([*base, "--lora", "nowhere.safetensors"], 66),
        ([*base, "--lora", "lora.safetensors"], 65),
        ([*base, "--vae", "nowhere"], 66),
        ([*base, "--vae", "spoilt/vae"], 65),
        ([*base, "--text-encoder", "spoilt/text_encoder"], 65),
        ([*base, "-o", "there.png"], 73),
        (["--refiner", "lab.turbo", "--init-image", "text.png"], 65),
        ([*base, "--refiner", "lab.turbo", "--strength", "0"], 2),
        ([*base, "--refiner", "lab.turbo", "--refine-cfg", "inf"], 2),
    ]
    arguments = json.dumps([case for case, _ in wrong])
    ran = subprocess.run(
        [sys.executable, "-c", WRONG, arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert [line for line in ran.stdout.splitlines() if line.startswith("CODE")] == [f"CODE {code} []" for _, code in wrong], ran.stderr  # fmt: skip


def test_the_api_passes_numbers_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mergetool

    seen: list[SampleOptions] = []

    def note(asked: SampleOptions) -> None:
        seen.append(asked)
        raise MergetoolError("enough")

    monkeypatch.setattr(settings, "prepare", note)
    with pytest.raises(MergetoolError, match="enough"):
        mergetool.sample(PROMPT, base="lab.base", loras={"a.safetensors": 0.123456789}, strength=0.123456789)
    assert float(seen[0].first.loras[0][1]) == 0.123456789
    assert seen[0].second.strength == (0.123456789,)


def test_parts_that_are_all_named_leave_the_pipeline_without_effect() -> None:
    folder = models.EMBEDDED / "base"
    named = {name: folder / name for name in ("text_encoder", "tokenizer", "vae")}
    notes = prepare(SampleOptions(PROMPT, base="lab.base", pipeline="lab.base", **named)).notes
    assert [note.split(":")[0] for note in notes] == ["`pipeline` has no effect"]
