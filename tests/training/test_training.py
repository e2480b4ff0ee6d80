"""Training stops at any step and goes on to the same weights, bit for bit; its fast forward is the transformer's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline

from training import batched, models, sampling
from training.data import Plan
from training.recipes import RECIPES
from training.run import Attempt, Clock, Round


class Steps(Clock):
    """A clock that stops before step ``last``."""

    def __init__(self, last: float) -> None:
        super().__init__()
        self.left = last

    def paused(self) -> bool:
        self.left -= 1
        return self.left < 0


def attempt(folder: Path, clock: Clock) -> Attempt:
    """A tiny attempt whose ancestor trains six steps on one chunk of pictures."""
    plan = Plan((1, 1, 1), 8)
    recipes = {"ancestor": dataclasses.replace(RECIPES["ancestor"], steps=6, plan=plan)}
    made = Attempt(1, folder / "members", folder / "states", torch.device("cpu"), clock, recipes)
    if not (made.members / "vae").exists():
        models.store(models.vae(), made.members / "vae")
    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "states" / "ancestor.pt", weights_only=True)["modules"][
        "transformer"
    ]
    return state


@pytest.mark.filterwarnings("ignore")
def test_a_member_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.losses.BATCH", 8)
    monkeypatch.setattr("training.run.VALIDATED_ON", 8)
    torch.manual_seed(0)
    # Three chunks of data, then steps: the clock is asked before each.
    assert not attempt(tmp_path / "whole", Steps(3 + 5)).train("ancestor")
    (tmp_path / "parts" / "members").mkdir(parents=True)
    (tmp_path / "whole" / "members" / "vae").rename(tmp_path / "parts" / "members" / "vae")
    for asked in (2, 1 + 2, 2, 1):
        assert not attempt(tmp_path / "parts", Steps(asked)).train("ancestor")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    state = torch.load(tmp_path / "parts" / "states" / "ancestor.pt", weights_only=True)
    assert state["step"] == 5
    assert [piece["steps"] for piece in state["pieces"]] == [[0, 2], [2, 4], [4, 5]]

    shelved = attempt(tmp_path / "parts", Steps(0))
    Round(shelved, shelved.recipes["ancestor"]).shelve()
    (tmp_path / "parts" / "states" / "ancestor.pt").unlink()
    again = Round(shelved, shelved.recipes["ancestor"])
    assert again.step == 5
    for name, tensor in again.modules["transformer"].state_dict().items():
        assert torch.equal(tensor, parts[name].half().float()), name


@pytest.mark.parametrize("size", [(16, 16), (20, 12), (6, 30)])
def test_the_fast_forward_is_the_transformers_own(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    model = models.transformer()
    latents, time = torch.randn(3, 16, *size), torch.rand(3)
    captions, lengths = torch.randn(3, 32, models.TEXT_WIDTH), torch.tensor([5, 20, 32])
    known = torch.arange(32) < lengths[:, None]
    with torch.no_grad():
        lists = [caption[:length] for caption, length in zip(captions, lengths.tolist(), strict=True)]
        wanted = torch.stack(
            model([latent.unsqueeze(1) for latent in latents], time, lists, return_dict=False)[0]
        ).squeeze(2)
        found = batched.velocity(model, latents, time, batched.context(model, captions, known))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_told_to_use_the_fast_forward_answers_as_before() -> None:
    """But for BF16 products, where captions fill up to one length; to the bit where they do not."""
    torch.manual_seed(1)
    model = models.transformer()
    latents, time = list(torch.randn(2, 16, 1, 16, 16)), torch.rand(2)
    captions = {length: torch.randn(length, models.TEXT_WIDTH) for length in (5, 20, 40)}
    with torch.no_grad():
        calls = [(latents, time, [captions[5], captions[other]]) for other in (20, 40)]
        wanted = [torch.stack(model(*call, return_dict=False)[0]) for call in calls]
        batched.use(model)
        found = [torch.stack(model(*call, return_dict=False)[0]) for call in calls]
    assert 0 < float((found[0] - wanted[0]).norm() / wanted[0].norm()) < 0.02
    assert torch.equal(found[1], wanted[1])


def test_a_long_prompt_and_an_odd_size_draw_something() -> None:
    model = models.transformer()
    with torch.no_grad():
        found = model(
            [torch.randn(16, 1, 6, 90)], torch.tensor([0.5]), [torch.randn(700, models.TEXT_WIDTH)], return_dict=False
        )[0]
    assert found[0].shape == (16, 1, 6, 90)


def test_a_new_front_leaves_the_layers_alone() -> None:
    model, fresh = models.transformer(), models.transformer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    models.renew(model, fresh)
    for name, tensor in model.state_dict().items():
        new = name.startswith(("noise_refiner.", "context_refiner.", "cap_embedder.")) or name == "cap_pad_token"
        assert torch.equal(tensor, fresh.state_dict()[name] if new else before[name]), name


def test_sampling_is_that_of_diffusers_own_pipeline(tmp_path: Path) -> None:
    """With guidance, the same noise and float32, but for the BF16 products of training."""
    torch.manual_seed(2)
    tokenizer = models.tokenizer(tmp_path / "tokenizer")
    encoder, model = models.text_encoder(len(tokenizer)).eval(), models.transformer().eval()
    pipeline = ZImagePipeline(
        scheduler=models.scheduler(3.0), vae=models.vae(), text_encoder=encoder, tokenizer=tokenizer, transformer=model
    )
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a red circle left of a blue square on a gold background", "a pink cross on a black background"]
    noise = sampling.noise(2, (64, 64), torch.Generator().manual_seed(3))
    wanted = pipeline(
        prompt=list(prompts),  # the pipeline writes its template into the list
        negative_prompt=["", ""],
        latents=noise,
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
    ).images
    reader = sampling.Reader(tokenizer, encoder)
    found = sampling.sample(
        model, reader.many(prompts), noise, sampling.grid(4, 3.0), guidance=3.0, empty=reader.many([""])
    )
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
