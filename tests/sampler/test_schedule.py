"""Noise levels against diffusers' scheduler and pipelines, and the two meanings of strength."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, ZImageImg2ImgPipeline
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

from mergetool.errors import UsageError
from mergetool.sampler.schedule import levels, refinement_levels


def scheduler(steps: int, shift: float) -> FlowMatchEulerDiscreteScheduler:
    made = FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(sigmas=get_default_z_image_sigmas(steps))
    return made


@pytest.mark.parametrize("shift", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("steps", [*range(1, 61), 100, 1000])
def test_levels_are_the_schedulers_to_the_last_bit(steps: int, shift: float) -> None:
    assert levels(steps, shift, "diffusers") == tuple(scheduler(steps, shift).sigmas.tolist())


def test_four_steps_at_shift_three() -> None:
    assert levels(4, 3.0) == pytest.approx((1.0, 0.9, 0.75, 0.5, 0.0))


@pytest.mark.parametrize("strength", [0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 8, 9, 10, 20, 30])
def test_diffusers_strength_runs_the_steps_that_its_pipeline_runs(steps: int, strength: float) -> None:
    theirs = scheduler(steps, 3.0)
    _, count = ZImageImg2ImgPipeline.get_timesteps(SimpleNamespace(scheduler=theirs), steps, strength, "cpu")
    assert refinement_levels(steps, 3.0, strength, "diffusers", "diffusers") == tuple(
        theirs.sigmas[-count - 1 :].tolist()
    )


def test_one_strength_has_two_meanings() -> None:
    assert refinement_levels(8, 3.0, 0.15, "comfyui")[0] == pytest.approx(0.348, abs=5e-4)
    assert refinement_levels(8, 3.0, 0.15, "diffusers") == pytest.approx((0.5, 0.3, 0.0))


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan"), float("inf")])
@pytest.mark.parametrize("meaning", ["comfyui", "diffusers"])
def test_strength_outside_its_range_is_refused(strength: float, meaning: str) -> None:
    with pytest.raises(UsageError, match="`strength"):
        refinement_levels(8, 3.0, strength, meaning)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "shift"), [(0, 3.0), (-1, 3.0), (10_001, 3.0), (4, 0.0), (4, -1.0), (4, float("nan"))]
)
def test_impossible_schedules_are_refused(steps: int, shift: float) -> None:
    with pytest.raises(UsageError):
        levels(steps, shift)


def test_an_unknown_scheduler_is_refused() -> None:
    with pytest.raises(UsageError, match="a scheduler is one of simple, normal, sgm_uniform, beta, diffusers"):
        levels(4, 3.0, "karras")  # type: ignore[arg-type]


def test_tiny_strength_does_not_build_an_endless_schedule() -> None:
    with pytest.raises(UsageError, match="10000 is the limit"):
        refinement_levels(8, 3.0, 1e-9, "comfyui")
