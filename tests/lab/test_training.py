"""The parts of the training: they follow the same conventions as the sampler that its models meet later."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

from mergetool.lab.training import distil, flow, models


@pytest.fixture(scope="module")
def pipeline(pipelines: Path) -> ZImagePipeline:
    return ZImagePipeline.from_pretrained(pipelines / "base", dtype=torch.float32)


@pytest.mark.parametrize("shift", [3.0, 6.0])
def test_noise_levels_are_those_of_the_scheduler(shift: float) -> None:
    scheduler: FlowMatchEulerDiscreteScheduler = models.scheduler(shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 30, 30).tolist())
    torch.testing.assert_close(flow.grid(30, shift), scheduler.sigmas, rtol=1e-5, atol=1e-6)


def test_captions_are_those_of_the_pipeline(pipeline: ZImagePipeline) -> None:
    prompts = ["a red circle on a white background", "a blue cross on a gold background", ""]
    found = flow.captions(pipeline, prompts)
    wanted, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device="cpu")
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_words_of_the_world_are_one_token_each(pipeline: ZImagePipeline) -> None:
    assert len(pipeline.tokenizer(" striped hollow triangle")["input_ids"]) == 3
    text = "anything ümlaut 你好"
    assert pipeline.tokenizer.decode(pipeline.tokenizer(text)["input_ids"]) == text


def test_a_recorded_path_is_the_sampling_of_the_teacher(pipeline: ZImagePipeline) -> None:
    paths, sigmas, texts = distil.record(pipeline, 2, guidance=2.0, seed=3)
    assert paths.shape == (2, distil.STEPS * distil.SUBSTEPS + 1, 16, 16, 16)
    coarse = flow.grid(distil.STEPS, distil.SHIFT)
    torch.testing.assert_close(sigmas[:: distil.SUBSTEPS], coarse)
    empty = flow.captions(pipeline, [""])[0]
    last = flow.sample(pipeline.transformer, texts, paths[:, 0], sigmas, guidance=2.0, empty=empty)
    torch.testing.assert_close(paths[:, -1], last)


def test_the_students_loss_is_zero_for_a_student_that_goes_where_the_teacher_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A path of constant velocity: its mean velocity over any part is that velocity."""
    velocity = torch.randn(2, 16, 16, 16)
    sigmas = distil.noise_levels()
    paths = (1 - sigmas).view(1, -1, 1, 1, 1) * velocity[:, None]
    monkeypatch.setattr(
        flow, "predict", lambda model, latents, sigma, texts: torch.stack([velocity[int(text)] for text in texts])
    )
    texts = [torch.tensor(0), torch.tensor(1)]
    loss = distil.loss(None, paths, sigmas, texts, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert float(loss) < 1e-9


def test_new_refiners_leave_the_layers_alone() -> None:
    model, fresh = models.transformer(), models.transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distil.reset_refiners(model, fresh)
    for name, tensor in model.state_dict().items():
        wanted = fresh.state_dict()[name] if "refiner" in name else before[name]
        assert torch.equal(tensor, wanted), name


def test_the_loop_learns_and_ends_with_averages() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 96)
    inputs = torch.randn(256, 96)
    wanted = inputs @ torch.randn(96, 96) / 10
    losses: list[float] = []
    flow.train(
        list(layer.parameters()),
        lambda: torch.nn.functional.mse_loss(layer(inputs).float(), wanted),
        steps=150,
        rate=2e-2,
        averaged=[layer],
        report=lambda step, loss, seconds: losses.append(loss),
    )
    assert losses[-1] < 0.6 * losses[0]
    with torch.no_grad():
        averaged = float(torch.nn.functional.mse_loss(layer(inputs), wanted))
    assert averaged < losses[-1] * 1.5


def test_a_saved_member_names_no_path(pipelines: Path) -> None:
    folder = pipelines / "again"
    models.save(folder, ZImagePipeline.from_pretrained(pipelines / "base", dtype=torch.float32))
    assert not any(str(pipelines) in path.read_text() for path in folder.rglob("*.json"))
