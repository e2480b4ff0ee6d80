"""Stages of other families, drawn by diffusers' own pipelines.

What `Studio` calls latents are pictures here, uint8 [n, height, width, 3]: each stage ends in pixels, which any family can go on from.

studio = DiffusersStudio(PipelineFolder.of("./FLUX.1-schnell", None))
pictures = studio.first_stage(PipelineStage("./FLUX.1-schnell", "FluxPipeline", steps=4), shots, (1024, 1024))
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from mergetool.errors import NonFiniteError, UsageError
from mergetool.sampler import load
from mergetool.sampler.pipeline_folder import PipelineFolder
from mergetool.sampler.request import Pictures, PipelineRefinement, PipelineStage, Shot, StepCounter


@dataclass
class DiffusersStudio:
    """One pipeline of diffusers, on a device in a dtype; loaded when it first draws."""

    folder: PipelineFolder
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    notes: list[str] = field(default_factory=list)
    _pipeline: Any = None

    def first_stage(
        self,
        stage: PipelineStage,
        shots: Sequence[Shot],
        size: tuple[int, int],
        *,
        progress: StepCounter = lambda _: None,
    ) -> Pictures:
        """Draw every shot from pure noise, at ``size`` = (width, height). Raises DataError and NonFiniteError."""
        given = {"width": size[0], "height": size[1], "num_inference_steps": stage.steps}
        return np.stack(
            [self._draw(self._loaded(), stage, shot.prompt, shot.seed, shot, given, progress) for shot in shots]
        )

    def second_stage(
        self,
        stage: PipelineRefinement,
        shots: Sequence[Shot],
        pictures: Pictures,
        *,
        progress: StepCounter = lambda _: None,
    ) -> Pictures:
        """Bring each shot's picture to the stage's strength, and draw it again.

        Raises UsageError for a pipeline that diffusers has no image-to-image form of.
        """
        pipeline, made = self._from_pictures(), []
        for shot, picture in zip(shots, pictures, strict=True):
            given = {
                "image": Image.fromarray(picture),
                "strength": stage.strength,
                "num_inference_steps": stage.schedule,
                "width": picture.shape[1],
                "height": picture.shape[0],
            }
            made.append(self._draw(pipeline, stage, shot.second_prompt, shot.second_seed, shot, given, progress))
        return np.stack(made)

    def decode(self, pictures: Pictures) -> Pictures:
        """The pictures, which need no decoding."""
        return pictures

    def encode(self, pictures: Pictures) -> Pictures:
        """The pictures, which the pipeline encodes itself."""
        return pictures

    def _draw(
        self,
        pipeline: Any,
        stage: PipelineStage,
        prompt: str,
        seed: int,
        shot: Shot,
        given: dict[str, Any],
        progress: StepCounter,
    ) -> Pictures:
        takes = inspect.signature(pipeline.__call__).parameters

        def step_done(_pipeline: Any, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            progress(1)
            return kept

        given = given | _guidance(stage, takes) | {"negative_prompt": _negative(stage, shot, takes)}
        given |= {"callback_on_step_end": step_done, "output_type": "np"}
        generator = torch.Generator("cpu").manual_seed(seed)
        with load.quiet():
            drawn = pipeline(
                prompt=prompt,
                generator=generator,
                **{name: value for name, value in given.items() if name in takes and value is not None},
            ).images[0]
        if not np.isfinite(drawn).all():
            raise NonFiniteError(
                f'{stage.model} makes NaN or infinity of "{prompt[:30]}"; run it with `dtype=fp32`, or get its files again.'
            )
        # As diffusers turns them into pictures.
        picture: Pictures = (drawn * 255).round().astype(np.uint8)
        return picture

    def _loaded(self) -> Any:
        if self._pipeline is None:
            self._pipeline = load.load_pipeline(self.folder, dtype=self.dtype)
            self._pipeline.set_progress_bar_config(disable=True)
            if self.device.startswith("cuda"):
                self._pipeline.enable_model_cpu_offload(device=self.device)
        return self._pipeline

    def _from_pictures(self) -> Any:
        """The same pipeline in its image-to-image form."""
        kind = load.pipeline_class(f"{self.folder.kind.removesuffix('Pipeline')}Img2ImgPipeline")
        if kind is None:
            raise UsageError(
                f'diffusers has no image-to-image form of {self.folder.kind}, so "{self.folder.path}" cannot be a second stage; '
                "let it draw the first, with `base`."
            )
        with load.quiet():
            pipeline = kind.from_pipe(self._loaded())
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _guidance(stage: PipelineStage, takes: Any) -> dict[str, float | None]:
    """``guidance`` is the pipeline's guidance_scale; ``cfg`` its true_cfg_scale where it has one, else guidance_scale."""
    if "true_cfg_scale" in takes:
        return {"guidance_scale": stage.guidance, "true_cfg_scale": stage.cfg}
    return {"guidance_scale": stage.guidance if stage.cfg is None else stage.cfg}


def _negative(stage: PipelineStage, shot: Shot, takes: Any) -> str | None:
    """The negative prompt. A true_cfg_scale above 1 does nothing in diffusers without one, so a blank stands for none."""
    if shot.negative or "true_cfg_scale" not in takes:
        return shot.negative or None
    scale = takes["true_cfg_scale"].default if stage.cfg is None else stage.cfg
    return " " if scale > 1 else None
