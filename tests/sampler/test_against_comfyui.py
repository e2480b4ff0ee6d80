"""The sampler against the real ComfyUI 0.30: levels and noise to the last bit, latents of both stages to float32's rounding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergetool.checkpoint.dtypes import F32
from mergetool.engine import job
from mergetool.options.merging import MergeOptions
from mergetool.options.pictures import SampleOptions
from mergetool.options.sampling import SAMPLERS, SCHEDULERS
from mergetool.sampler import settings
from mergetool.sampler.denoise import starting_noise
from mergetool.sampler.parts import Components
from mergetool.sampler.request import Refinement, Shot, Stage
from mergetool.sampler.schedule import levels, refinement_levels
from mergetool.sampler.studio import Studio
from tests.oracles import ComfyUI

COMFYUIS = [name for name in SCHEDULERS if name != "diffusers"]
BEYOND = (1001, 1333, 1999, 2000, 2500, 10_000)
LARGEST = {"euler": 4e-5, "res_multistep": 1e-4, "dpmpp_2m_sde": 5e-4}
"""Largest difference of latents, relative in the Euclidean norm: the two programs round at other places in each step, and a sampler that
extrapolates passes more of that on. Measured: 1.4e-5, 5.9e-5, 2.6e-4. Other formulas, levels or noise are off by 1e-3 and more.
"""

SHOT = Shot(
    "a blue circle on a gold background", seed=41, negative="a red cross on a white background, and a long text"
)


@pytest.mark.parametrize("scheduler", COMFYUIS)
@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_levels_are_comfyuis_to_the_last_bit_for_every_number_of_steps(
    comfyui: ComfyUI, tmp_path: Path, shift: float, scheduler: Any
) -> None:
    # ComfyUI computes every level of "normal" and "sgm_uniform" apart, a second for a hundred thousand of them.
    counts = [*range(1, 1001), *BEYOND] if scheduler in ("simple", "beta") else [*range(1, 201), *range(207, 1001, 31)]
    comfyui.ask("sigmas", shift=shift, scheduler=scheduler, steps=counts, output=tmp_path / "sigmas.safetensors")
    found = {int(n): tuple(wanted.tolist()) for n, wanted in load_file(tmp_path / "sigmas.safetensors").items()}
    assert len(found) == len(counts)
    assert [n for n, wanted in found.items() if levels(n, shift, scheduler) != wanted] == []


@pytest.mark.parametrize("scheduler", COMFYUIS)
def test_strength_runs_the_levels_of_comfyuis_denoise(comfyui: ComfyUI, scheduler: Any) -> None:
    strengths = [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.33, 0.4, 0.6, 0.7, 0.99, 0.9999, 0.99995, 1.0]
    runs = list(itertools.product([1, 2, 3, 4, 5, 8, 9, 20], strengths))
    wanted = comfyui.ask("denoised_sigmas", shift=3.0, scheduler=scheduler, runs=runs)["levels"]
    found = [list(refinement_levels(steps, 3.0, strength, "comfyui", scheduler)) for steps, strength in runs]
    assert found == wanted


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_seed_of_64_bits_gives_comfyuis_noise(comfyui: ComfyUI, tmp_path: Path, seed: int) -> None:
    comfyui.ask("noise", seed=seed, shape=[1, 16, 8, 6], output=tmp_path / "noise.safetensors")
    assert torch.equal(starting_noise([seed], (16, 8, 6)), load_file(tmp_path / "noise.safetensors")["noise"])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """The embedded models as ComfyUI's files."""
    folder = tmp_path_factory.mktemp("comfyui")
    for name in ("base", "turbo"):
        with job.open_merge(f"1*lab.{name}", MergeOptions(layout="comfyui", dtype=F32)) as plan:
            job.run_merge(plan, folder / f"{name}.safetensors")
    return {name: str(folder / f"{name}.safetensors") for name in ("base", "turbo")}


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(Components.find("lab.base"))


Latents = Callable[[Sequence[Stage], tuple[int, int]], float]


@pytest.fixture
def difference(comfyui: ComfyUI, files: Mapping[str, str], studio: Studio, tmp_path: Path) -> Latents:
    """The largest relative difference of our latents from KSampler's, over stages that all start from noise or from one picture."""

    def measure(stages: Sequence[Stage], size: tuple[int, int] = (64, 64)) -> float:
        picture = studio.first_stage(Stage("lab.base", steps=4), [SHOT], size)
        positive, negative = studio.captions([SHOT.prompt, SHOT.negative])
        given = {"positive": positive, "negative": negative, "picture": picture}
        save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "given.safetensors")
        runs = [{"name": str(i), **_run(stage, files, picture)} for i, stage in enumerate(stages)]
        comfyui.ask("ksampler", runs=runs, inputs=tmp_path / "given.safetensors", output=tmp_path / "made.safetensors")
        wanted = load_file(tmp_path / "made.safetensors")
        return max(_relative(_ours(studio, stage, picture, size), wanted[str(i)]) for i, stage in enumerate(stages))

    return measure


def _run(stage: Stage, files: Mapping[str, str], picture: torch.Tensor) -> dict[str, Any]:
    second = isinstance(stage, Refinement)
    return {
        "model": files[stage.model.removeprefix("lab.")],
        "steps": stage.steps,
        "cfg": stage.guidance + 1,
        "shift": stage.shift,
        "sampler": stage.sampler,
        "scheduler": stage.scheduler,
        "seed": SHOT.second_seed if second else SHOT.seed,
        "positive": "positive",
        "negative": "negative",
        "latent": "picture" if second else None,
        "size": list(picture.shape[1:]),
        "denoise": stage.strength if isinstance(stage, Refinement) else 1.0,
    }


def _ours(studio: Studio, stage: Stage, picture: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if isinstance(stage, Refinement):
        return studio.second_stage(stage, [SHOT], picture)
    return studio.first_stage(stage, [SHOT], size)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scheduler", COMFYUIS)
def test_a_first_stage_makes_ksamplers_latents(difference: Latents, sampler: Any, scheduler: Any) -> None:
    stages = [
        Stage("lab.base", steps, cfg - 1, 3.0, sampler=sampler, scheduler=scheduler)
        for steps, cfg in ((7, 0.5), (6, 1.0), (9, 4.0))
    ]
    assert difference(stages, (64, 64)) <= LARGEST[sampler]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scheduler", COMFYUIS)
def test_a_second_stage_makes_ksamplers_latents(difference: Latents, sampler: Any, scheduler: Any) -> None:
    stages = [
        Refinement("lab.turbo", 4, cfg - 1, 3.0, sampler=sampler, scheduler=scheduler, strength=strength)
        for strength, cfg in itertools.product((0.15, 0.4, 0.6), (0.5, 1.0, 4.0))
    ]
    assert difference(stages, (72, 56)) <= LARGEST[sampler]


@pytest.mark.parametrize(("preset", "model"), [("comfyui-base", "lab.base"), ("comfyui-turbo", "lab.turbo")])
def test_a_preset_draws_the_stock_templates_latents(difference: Latents, preset: str, model: str) -> None:
    stage = settings.stage(SampleOptions(base=model, preset=preset).first)
    assert (stage.sampler, stage.scheduler, stage.shift) == ("res_multistep", "simple", 3.0)
    assert difference([stage], (64, 64)) <= LARGEST["res_multistep"]


def test_a_schedule_that_repeats_levels_changes_nothing_at_them(difference: Latents) -> None:
    assert difference([Refinement("lab.turbo", 20, strength=0.01)], (64, 64)) <= LARGEST["euler"]
