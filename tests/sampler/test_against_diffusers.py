"""The sampler's pictures against those of diffusers' own pipelines, from the same captions, noise and levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImageImg2ImgPipeline, ZImagePipeline

from mergetool import models
from mergetool.sampler.denoise import bring_to, starting_noise
from mergetool.sampler.parts import Components
from mergetool.sampler.request import Refinement, Shot, Stage
from mergetool.sampler.studio import Studio

PROMPTS = ("a blue circle on a gold background", "a red cross on a white background")
SHOTS = tuple(Shot(prompt, seed) for seed, prompt in enumerate(PROMPTS, 5))


@pytest.fixture(scope="module")
def pipelines() -> Path:
    """The embedded models: trained weights, so that pictures are of something."""
    return models.EMBEDDED


@pytest.fixture(scope="module")
def studio(pipelines: Path) -> Studio:
    return Studio(Components.find(str(pipelines / "base")))


def pipeline(folder: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(folder, dtype=torch.float32)


def noise() -> torch.Tensor:
    return starting_noise([shot.seed for shot in SHOTS], (16, 16, 16))


@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_first_stage_equals_the_pipeline_to_the_last_bit(studio: Studio, pipelines: Path, guidance: float) -> None:
    theirs = pipeline(pipelines / "base")
    wanted = theirs(
        prompt_embeds=studio.captions(PROMPTS),
        negative_prompt_embeds=studio.captions(["", ""]),
        height=64,
        width=64,
        num_inference_steps=6,
        guidance_scale=guidance,
        latents=noise(),
        output_type="latent",
    ).images
    found = studio.first_stage(
        Stage(str(pipelines / "base"), steps=6, guidance=guidance, shift=6.0, scheduler="diffusers"), SHOTS, (64, 64)
    )
    assert torch.equal(found, wanted)


def test_pictures_equal_the_pipelines_from_prompt_to_pixel(studio: Studio, pipelines: Path) -> None:
    theirs = pipeline(pipelines / "base")
    wanted = theirs(
        prompt=list(PROMPTS),
        negative_prompt=["", ""],
        height=64,
        width=64,
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=noise(),
        output_type="np",
    ).images
    found = studio.decode(
        studio.first_stage(
            Stage(str(pipelines / "base"), steps=6, guidance=3.0, shift=6.0, scheduler="diffusers"), SHOTS, (64, 64)
        )
    )
    # Captions are padded to 512 there, to the longest here: a float32 product of another shape differs in its last bits.
    assert np.abs(found.astype(float) - wanted * 255).max() <= 1.0


@pytest.mark.parametrize("strength", [0.15, 0.4, 1.0])
def test_second_stage_equals_the_image_pipeline_in_its_meaning_of_strength(
    studio: Studio, pipelines: Path, strength: float
) -> None:
    clean = studio.first_stage(Stage(str(pipelines / "base"), steps=3, shift=6.0), SHOTS, (64, 64))
    stage = Refinement(
        str(pipelines / "turbo"), steps=8, shift=3.0, strength=strength, strength_as="diffusers", scheduler="diffusers"
    )
    found = studio.second_stage(stage, SHOTS, clean)
    second = starting_noise([shot.second_seed for shot in SHOTS], (16, 16, 16))
    turbo = pipeline(pipelines / "turbo")
    image = ZImageImg2ImgPipeline(**turbo.components)
    wanted = image(
        image=torch.zeros(2, 3, 64, 64),
        latents=bring_to(clean, second, stage.levels()[0]),
        prompt_embeds=studio.captions(PROMPTS),
        negative_prompt_embeds=studio.captions(["", ""]),
        strength=strength,
        num_inference_steps=8,
        guidance_scale=0.0,
        height=64,
        width=64,
        output_type="latent",
    ).images
    assert torch.equal(found, wanted)


def test_noise_is_added_as_the_scheduler_adds_it(studio: Studio, pipelines: Path) -> None:
    clean, added = torch.randn(1, 16, 16, 16), torch.randn(1, 16, 16, 16)
    scheduler = pipeline(pipelines / "turbo").scheduler
    scheduler.set_timesteps(sigmas=[0.5, 0.25])
    wanted = scheduler.scale_noise(clean, scheduler.timesteps[:1], added)
    torch.testing.assert_close(bring_to(clean, added, float(scheduler.sigmas[0])), wanted, rtol=1e-6, atol=1e-6)


def test_encoding_a_picture_equals_the_vaes_mean(studio: Studio, pipelines: Path, tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    vae = pipeline(pipelines / "base").vae
    image = torch.from_numpy(picture).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(image).latent_dist.mean
    wanted = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    torch.testing.assert_close(studio.encode(picture), wanted, rtol=1e-5, atol=1e-5)
