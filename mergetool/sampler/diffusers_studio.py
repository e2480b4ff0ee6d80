"""Stages of other families, drawn by diffusers' own pipelines.

What `Studio` calls latents are pictures here, from which any family can go on, with the latents that they were decoded from.

studio = DiffusersStudio(PipelineFolder.of("./FLUX.1-schnell", None))
drawn = studio.first_stage(PipelineStage("./FLUX.1-schnell", "FluxPipeline", steps=4), shots, (1024, 1024))
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mergetool.errors import NonFiniteError, UsageError
from mergetool.sampler import load
from mergetool.sampler.pipeline_folder import PipelineFolder
from mergetool.sampler.request import Pictures, PipelineRefinement, PipelineStage, Shot, StepCounter


@dataclass(frozen=True, slots=True)
class StageResult:
    """The result of a stage: pictures uint8 [n, height, width, 3].

    ``latents`` are what each of them was decoded from, as the pipeline has it; of pictures from elsewhere there are none.
    """

    pictures: Pictures
    latents: tuple[Tensor, ...] = ()

    def __getitem__(self, rows: Sequence[int]) -> StageResult:
        """The pictures of these rows."""
        return StageResult(self.pictures[rows], tuple(self.latents[row] for row in rows) if self.latents else ())


@dataclass
class DiffusersStudio:
    """One pipeline of diffusers, on a device in a dtype; loaded when it first draws.

    The denoiser is that of the stage that draws; the other parts are the folder's for all of them.
    """

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
    ) -> StageResult:
        """Draw every shot from pure noise, at ``size`` = (width, height). Raises DataError and NonFiniteError."""
        given = {"width": size[0], "height": size[1], "num_inference_steps": stage.steps}
        pipeline = self._loaded(stage.model)
        return _together(self._draw(pipeline, stage, shot.prompt, shot.seed, shot, given, progress) for shot in shots)

    def second_stage(
        self,
        stage: PipelineRefinement,
        shots: Sequence[Shot],
        drawn: StageResult,
        *,
        progress: StepCounter = lambda _: None,
    ) -> StageResult:
        """Bring each shot's latents, or else its picture, to the stage's strength and draw again.

        Raises UsageError for a pipeline that diffusers has no image-to-image form of.
        """
        pipeline = self._from_pictures(stage.model)
        height, width = drawn.pictures.shape[1:3]
        given = {"strength": stage.strength, "num_inference_steps": stage.schedule, "width": width, "height": height}
        starts = (
            [_unpacked(pipeline, latents, height, width) for latents in drawn.latents]
            if drawn.latents
            else [Image.fromarray(picture) for picture in drawn.pictures]
        )
        return _together(
            self._draw(pipeline, stage, shot.second_prompt, shot.second_seed, shot, {**given, "image": start}, progress)
            for shot, start in zip(shots, starts, strict=True)
        )

    def decode(self, drawn: StageResult) -> Pictures:
        """The pictures, which the pipeline has decoded."""
        return drawn.pictures

    def encode(self, pictures: Pictures) -> StageResult:
        """The pictures, which the pipeline encodes itself."""
        return StageResult(pictures)

    def _draw(
        self,
        pipeline: Any,
        stage: PipelineStage,
        prompt: str,
        seed: int,
        shot: Shot,
        given: dict[str, Any],
        progress: StepCounter,
    ) -> tuple[Pictures, Tensor | None]:
        """A picture [height, width, 3], and the latents that it was decoded from, which are those of the last step."""
        takes = inspect.signature(pipeline.__call__).parameters
        latents: Tensor | None = None

        def step_done(_pipeline: Any, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
            nonlocal latents
            latents = kept.get("latents")
            progress(1)
            return kept

        given = given | _guidance(stage, takes) | {"negative_prompt": _negative(stage, shot, takes)}
        given |= {"callback_on_step_end": step_done, "output_type": "np", "num_frames": 1}
        generator = torch.Generator("cpu").manual_seed(seed)
        with load.quiet():
            made = pipeline(
                prompt=prompt,
                generator=generator,
                **{name: value for name, value in given.items() if name in takes and value is not None},
            )
        drawn = made.frames[0][0] if "num_frames" in takes else made.images[0]
        if not np.isfinite(drawn).all():
            raise NonFiniteError(
                f'{stage.model} makes NaN or infinity of "{prompt[:30]}"; run it with `dtype=fp32`, or get its files again.'
            )
        # As diffusers turns them into pictures.
        picture: Pictures = (drawn * 255).round().astype(np.uint8)
        return picture, None if latents is None else latents.cpu()

    def _loaded(self, model: str) -> Any:
        """The pipeline with a MODEL's weights; before others are read, those that it had are let go."""
        folder = self.folder.drawing(model)
        if self._pipeline is None:
            self._pipeline = load.load_pipeline(folder, dtype=self.dtype)
            self._pipeline.set_progress_bar_config(disable=True)
        elif folder == self.folder:
            return self._pipeline
        else:
            self._pipeline.remove_all_hooks()
            setattr(self._pipeline, folder.denoiser, None)
            self._pipeline.register_modules(**{folder.denoiser: load.load_denoiser(folder, dtype=self.dtype)})
        self.folder = folder
        if self.device.startswith("cuda"):
            self._pipeline.enable_model_cpu_offload(device=self.device)
        return self._pipeline

    def _from_pictures(self, model: str) -> Any:
        """The same pipeline in its image-to-image form."""
        loaded = self._loaded(model)
        if self.folder.needs_pictures:
            return loaded
        kind = load.pipeline_class(self.folder.kind_from_pictures)
        if kind is None:
            raise UsageError(
                f'diffusers has no image-to-image form of {self.folder.kind}, so "{self.folder.path}" cannot be a second stage; '
                "let it draw the first, with `base`."
            )
        with load.quiet():
            pipeline = kind.from_pipe(loaded, torch_dtype=self.dtype)  # which casts to float32 unless it is told
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _together(drawn: Iterable[tuple[Pictures, Tensor | None]]) -> StageResult:
    pictures, latents = zip(*drawn, strict=True)
    known = tuple(each for each in latents if each is not None)
    return StageResult(np.stack(pictures), known if len(known) == len(pictures) else ())


def _unpacked(pipeline: Any, latents: Tensor, height: int, width: int) -> Tensor:
    """Latents as [1, channels, height, width], which image-to-image pipelines take in the place of a picture.

    Pipelines that step packed patches [1, tokens, values] have a function for it. The image processor is told their channels, by which it knows
    latents; some pipelines leave it at 4 where their VAE has 16.
    """
    if latents.ndim == 3:
        latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    if latents.ndim == 5:
        latents = latents[:, :, 0]
    pipeline.image_processor.register_to_config(vae_latent_channels=latents.shape[1])
    return latents


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
