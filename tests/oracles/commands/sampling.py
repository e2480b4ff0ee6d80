"""The schedules, the noise and the KSampler of ComfyUI, for a flow model as its ModelSamplingAuraFlow node makes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_sampling
import comfy.sample
import comfy.samplers
import torch
from safetensors.torch import load_file, save_file

from tests.oracles.commands.models import loaded

MULTIPLIER = 1.0  # the AuraFlow node's, and that of every Z-Image


class Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """What the AuraFlow node puts into a model."""


def _flow(shift: float) -> Flow:
    made = Flow()
    made.set_parameters(shift=shift, multiplier=MULTIPLIER)
    return made


def sigmas(shift: float, scheduler: str, steps: Sequence[int], output: str) -> dict[str, Any]:
    """Writes ``scheduler``'s levels of a whole run for every number of ``steps``, by that number."""
    save_file({str(n): comfy.samplers.calculate_sigmas(_flow(shift), scheduler, n) for n in steps}, output)
    return {}


def denoised_sigmas(shift: float, scheduler: str, runs: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """``levels``: those that KSampler runs for every pair of steps and denoise."""

    class Model:
        def get_model_object(self, name: str) -> Any:
            return _flow(shift)

    made = [
        comfy.samplers.KSampler(Model(), steps, torch.device("cpu"), "euler", scheduler, denoise)
        for steps, denoise in runs
    ]
    return {"levels": [sampler.sigmas.tolist() for sampler in made]}


def noise(seed: int, shape: Sequence[int], output: str) -> dict[str, Any]:
    """Writes ``noise``, what the KSampler node starts from for an empty latent of that shape."""
    save_file({"noise": comfy.sample.prepare_noise(torch.zeros(*shape), seed)}, output)
    return {}


def ksampler(runs: Sequence[dict[str, Any]], inputs: str, output: str) -> dict[str, Any]:
    """Writes the latents of every run under its ``name``, in the scaled space that models work in.

    A run has model, steps, cfg, shift, sampler, scheduler, denoise, seed, and the names of tensors in ``inputs``: positive and negative
    (captions, [tokens, width]) and latent ([1, 16, rows, columns], or None for an empty one of ``size``).
    """
    given = load_file(inputs)
    save_file({run.pop("name"): _run(given, **run) for run in runs}, output)
    return {}


def _run(
    given: dict[str, torch.Tensor],
    model: str,
    shift: float,
    seed: int,
    positive: str,
    negative: str,
    latent: str | None,
    **how: Any,
) -> torch.Tensor:
    patcher = loaded(model).patcher.clone()
    flow = type("Patched", (Flow,), {})(patcher.model.model_config)
    flow.set_parameters(shift=shift, multiplier=MULTIPLIER)
    patcher.add_object_patch("model_sampling", flow)
    space = patcher.model.latent_format
    start = torch.zeros(1, *how.pop("size")) if latent is None else space.process_out(given[latent])
    made = comfy.sample.sample(
        patcher,
        comfy.sample.prepare_noise(start, seed),
        how["steps"],
        how["cfg"],
        how["sampler"],
        how["scheduler"],
        _conditioning(given[positive]),
        _conditioning(given[negative]),
        start,
        denoise=how.get("denoise", 1.0),
        disable_pbar=True,
        seed=seed,
    )
    return space.process_in(made).contiguous().clone()


def _conditioning(caption: torch.Tensor) -> list[Any]:
    """What the CLIPTextEncode node gives for a caption."""
    mask = torch.ones(1, caption.shape[0], dtype=torch.long)
    return [[caption.unsqueeze(0), {"pooled_output": None, "attention_mask": mask}]]


COMMANDS = {"sigmas": sigmas, "denoised_sigmas": denoised_sigmas, "noise": noise, "ksampler": ksampler}
