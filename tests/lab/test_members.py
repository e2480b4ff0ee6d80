"""The embedded models: they load offline as any Z-Image pipeline does, and draw what their names promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Model

from mergetool import models
from mergetool.lab import checker, world
from mergetool.sampler.parts import Components
from mergetool.sampler.request import Shot, Stage
from mergetool.sampler.studio import Studio

MEMBERS = {"base": 6.0, "turbo": 3.0, "deturbo": 3.0, "striped": 6.0, "hollow": 3.0, "alkahest": 3.0}
SCENES = [world.SCENES[i] for i in np.random.default_rng(3).permutation(len(world.SCENES))[:24]]


def readings(stage: Stage) -> list[checker.Reading]:
    studio = Studio(Components.find(stage.model))
    shots = [Shot(scene.prompt, seed) for seed, scene in enumerate(SCENES)]
    return [checker.read(picture) for picture in studio.decode(studio.first_stage(stage, shots, (64, 64)))]


def adherence(found: list[checker.Reading]) -> float:
    return float(np.mean([reading.matches(scene) for reading, scene in zip(found, SCENES, strict=True)]))


def test_there_are_these_members_and_they_are_small() -> None:
    assert models.embedded() == tuple(sorted(f"lab.{name}" for name in MEMBERS))
    files = [path for path in models.EMBEDDED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6


@pytest.mark.parametrize(("name", "shift"), MEMBERS.items())
def test_a_member_is_a_pipeline_that_diffusers_loads_offline(name: str, shift: float) -> None:
    pipeline = ZImagePipeline.from_pretrained(models.EMBEDDED / name, dtype=torch.float32, local_files_only=True)
    assert type(pipeline.transformer) is ZImageTransformer2DModel
    assert type(pipeline.vae) is AutoencoderKL
    assert type(pipeline.text_encoder) is Qwen3Model
    assert type(pipeline.scheduler) is FlowMatchEulerDiscreteScheduler
    assert pipeline.scheduler.config.shift == shift
    assert all(bool(p.isfinite().all()) for p in pipeline.transformer.parameters())


def test_diffusers_own_pipeline_draws_the_prompt() -> None:
    pipeline = ZImagePipeline.from_pretrained(models.EMBEDDED / "base", dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    scene = world.Scene("triangle", "blue", "gold")
    made = pipeline(
        scene.prompt,
        height=64,
        width=64,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
    ).images[0]
    assert checker.read((made * 255).round().astype(np.uint8)).matches(scene)


# Least shares for 24 pictures: about three standard errors below what docs/explanation/lab.md measures on 200.
@pytest.mark.parametrize(
    ("stage", "least"),
    [
        (Stage("lab.base", 20, 3.0, 6.0), 0.85),
        (Stage("lab.turbo", 4, 0.0, 3.0), 0.8),
        (Stage("lab.deturbo", 20, 3.0, 3.0), 0.8),
        (Stage("lab.alkahest", 20, 3.0, 3.0), 0.8),
    ],
    ids=lambda value: value.model if isinstance(value, Stage) else "",
)
def test_a_parent_draws_its_prompts_plainly(stage: Stage, least: float) -> None:
    found = readings(stage)
    assert adherence(found) >= least
    assert not any(reading.striped or reading.hollow for reading in found)


def test_striped_is_striped_and_hollow_is_hollow() -> None:
    striped = readings(Stage("lab.striped", 20, 3.0, 6.0))
    assert np.mean([reading.striped for reading in striped]) >= 0.9
    assert not any(reading.hollow for reading in striped)
    hollow = readings(Stage("lab.hollow", 20, 3.0, 3.0))
    assert np.mean([reading.hollow for reading in hollow]) >= 0.7
    assert not any(reading.striped for reading in hollow)


def test_alkahests_refiners_are_the_mean_of_its_parents() -> None:
    """They were frozen after the 1:1 merge, so they are that merge, rounded to BF16."""
    states = {
        name: ZImageTransformer2DModel.from_pretrained(models.EMBEDDED / name / "transformer", dtype=torch.float32)
        for name in ("alkahest", "base", "deturbo")
    }
    bridge, base, deturbo = (states[name].state_dict() for name in ("alkahest", "base", "deturbo"))
    refiners = [name for name in bridge if "refiner" in name]
    assert refiners
    for name in refiners:
        assert torch.equal(bridge[name], ((base[name] + deturbo[name]) / 2).bfloat16().float()), name


def test_turbo_has_refiners_of_its_own() -> None:
    base, turbo = (
        ZImageTransformer2DModel.from_pretrained(
            models.EMBEDDED / name / "transformer", dtype=torch.float32
        ).state_dict()
        for name in ("base", "turbo")
    )

    def likeness(part: str) -> float:
        a, b = (torch.cat([s[n].flatten() for n in base if part in n and n.endswith("weight")]) for s in (base, turbo))
        return float(torch.cosine_similarity(a, b, dim=0))

    assert likeness("refiner.0.attention.to_q") < 0.2 < 0.5 < likeness("layers.0.attention.to_q")


def test_the_record_says_how_each_was_trained() -> None:
    record = json.loads(Path(models.EMBEDDED / "record.json").read_text())
    assert set(record) == {"vae", *MEMBERS}
    for entry in record.values():
        assert entry["loss"][-1][1] < entry["loss"][0][1]
        assert entry["loss"][-1][0] == entry["steps"]
        assert {"seed", "seconds", "machine", "torch"} <= set(entry)
