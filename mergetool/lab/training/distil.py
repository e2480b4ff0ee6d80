"""Distillation of a many-step model with guidance into one of four steps without.

The teacher's guided paths are recorded; the student, at a point of a path, learns the mean velocity to the next of its
four noise levels, so that one Euler step of its goes where several of the teacher's go.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from torch.nn import functional

from mergetool.lab.training import flow
from mergetool.lab.world import SCENES

STEPS = 4
SHIFT = 3.0
SUBSTEPS = 5
"""The teacher's steps to one of the student's."""


def noise_levels() -> Tensor:
    """The teacher's levels [21]: the student's four steps, each in SUBSTEPS even parts."""
    coarse = flow.grid(STEPS, SHIFT)
    parts = [torch.linspace(a, b, SUBSTEPS + 1)[:-1] for a, b in itertools.pairwise(coarse)]
    return torch.cat([*parts, coarse[-1:]])


@torch.no_grad()
def record(pipeline: ZImagePipeline, count: int, *, guidance: float, seed: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Record paths of the pipeline's transformer, [count, 21, 16, 16, 16].

    Returns them with their noise levels [21] and their captions.
    """
    sigmas = noise_levels()
    every = flow.captions(pipeline, [*(scene.prompt for scene in SCENES), ""])
    chosen = np.random.default_rng(seed).integers(len(SCENES), size=count)
    texts = [every[i] for i in chosen]
    generator = torch.Generator().manual_seed(seed)
    paths = torch.empty(count, len(sigmas), 16, 16, 16)
    for start in range(0, count, 128):
        part = texts[start : start + 128]
        path = [torch.randn(len(part), 16, 16, 16, generator=generator)]
        flow.sample(pipeline.transformer, part, path[0], sigmas, guidance=guidance, empty=every[-1], path=path)
        paths[start : start + len(part)] = torch.stack(path, 1)
    return paths, sigmas, texts


def loss(
    student: ZImageTransformer2DModel, paths: Tensor, sigmas: Tensor, texts: list[Tensor], generator: torch.Generator
) -> Tensor:
    """One batch: half of it at the student's own noise levels, half between them."""
    batch = flow.BATCH
    index = torch.randint(len(paths), (batch,), generator=generator)
    segment = torch.randint(STEPS, (batch,), generator=generator)
    inside = torch.randint(SUBSTEPS, (batch,), generator=generator)
    inside[: batch // 2] = 0
    start, end = segment * SUBSTEPS + inside, (segment + 1) * SUBSTEPS
    begin = paths[index, start]
    step = (sigmas[start] - sigmas[end]).view(-1, 1, 1, 1)
    wanted = (paths[index, end] - begin) / step
    found = flow.predict(student, begin, sigmas[start], [texts[i] for i in index.tolist()])
    return functional.mse_loss(found, wanted)


def reset_refiners(model: ZImageTransformer2DModel, fresh: ZImageTransformer2DModel) -> None:
    """Give the model the refiner blocks of an untrained one."""
    state = {name: tensor for name, tensor in fresh.state_dict().items() if "refiner" in name}
    model.load_state_dict(state, strict=False)
