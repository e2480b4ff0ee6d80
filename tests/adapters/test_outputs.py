"""A baked checkpoint computes what diffusers and PEFT compute with the LoRA beside the weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mergetool.adapters.convert import convert
from mergetool.adapters.lora_file import open_lora
from mergetool.engine import job
from mergetool.lab.training import models
from mergetool.options.merging import MergeOptions
from tests.adapters.spellings import random

RANK, ALPHA = 4, 3.0
EPSILON = 2.0**-24


@pytest.fixture(scope="module")
def transformer() -> ZImageTransformer2DModel:
    """The embedded family's architecture with random weights, float32."""
    torch.manual_seed(0)
    return models.transformer().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def files(transformer: ZImageTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base.safetensors, a LoRA of mixed size on every linear layer of the blocks in the default spelling, and as a PEFT folder."""
    folder = tmp_path_factory.mktemp("outputs")
    save_file(
        {name: tensor.contiguous() for name, tensor in transformer.state_dict().items()}, folder / "base.safetensors"
    )
    tensors = {}
    for i, (name, layer) in enumerate(transformer.named_modules()):
        if isinstance(layer, torch.nn.Linear) and (".attention." in name or ".feed_forward." in name):
            key = f"diffusion_model.{name}"
            tensors[f"{key}.lora_A.weight"] = random(RANK, layer.in_features, seed=i).float() / 4
            tensors[f"{key}.lora_B.weight"] = random(layer.out_features, RANK, seed=1000 + i).float() / 4
            tensors[f"{key}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, folder / "lora.safetensors")
    with open_lora(folder / "lora.safetensors") as file:
        convert(file, folder / "peft", "peft")
    return folder


def output(model: torch.nn.Module) -> torch.Tensor:
    """The velocity of two latents with captions of different length."""
    generator = torch.Generator().manual_seed(1)
    latents = [torch.randn(16, 1, 16, 16, generator=generator) for _ in range(2)]
    captions = [torch.randn(length, 64, generator=generator) for length in (9, 17)]
    with torch.no_grad():
        return torch.stack(model(latents, torch.tensor([0.3, 0.8]), captions, return_dict=False)[0])


def baked(files: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with job.open_merge(
        f"'{files / 'base.safetensors'}' + lora('{files / 'lora.safetensors'}')", MergeOptions()
    ) as plan:
        job.run_merge(plan, files / "baked.safetensors", overwrite=True)
    model = models.transformer().eval()
    model.load_state_dict(load_file(files / "baked.safetensors"))
    return output(model.to(dtype))


def in_diffusers(files: Path) -> torch.Tensor:
    model = models.transformer().eval()
    model.load_state_dict(load_file(files / "base.safetensors"))
    pipeline = ZImagePipeline(None, None, None, None, model)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.load_lora_weights(str(files), weight_name="lora.safetensors")
    return output(pipeline.transformer)


def in_peft(files: Path) -> torch.Tensor:
    model = models.transformer().eval()
    model.load_state_dict(load_file(files / "base.safetensors"))
    return output(PeftModel.from_pretrained(model, str(files / "peft")))


def limit(transformer: ZImageTransformer2DModel, wanted: torch.Tensor) -> float:
    """What two float32 runs that round otherwise may differ by.

    Every layer's sum rounds its products once more or less: sqrt(width) roundings of random sign, relative to the layer's own size.
    The errors of layers add up like independent ones, and the network hands each on about as large as it is (its norms keep
    activations at size one). Four standard deviations of that, relative to the largest output.
    """
    layers = sum(isinstance(layer, torch.nn.Linear) for layer in transformer.modules())
    return 4 * EPSILON * (256 * layers) ** 0.5 * float(wanted.abs().max())


@pytest.mark.parametrize("program", [in_diffusers, in_peft], ids=["diffusers", "PEFT"])
def test_outputs_agree_with_the_lora_beside_the_weights(
    transformer: ZImageTransformer2DModel, files: Path, program: object
) -> None:
    theirs = program(files)  # type: ignore[operator]
    difference = float((baked(files) - theirs).abs().max())
    print(f"largest output {float(theirs.abs().max()):.4f}, largest difference {difference:.3g}")
    assert difference <= limit(transformer, theirs)
    moved = float((output(transformer) - theirs).abs().max())
    assert moved > 1000 * difference  # the LoRA is far above the noise
