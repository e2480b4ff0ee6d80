"""The options of the sampler's two stages, which every command that makes pictures has."""

from __future__ import annotations

from typing import Annotated

import typer

Preset = Annotated[str | None, typer.Option("--preset", help="Settings of ComfyUI's template [see below]")]
Steps = Annotated[int | None, typer.Option("--steps", help="Steps of the first stage [default: 30]")]
Guidance = Annotated[
    float | None, typer.Option("--guidance", help="Guidance as diffusers counts it: cfg - 1 [default: 3]")
]
Cfg = Annotated[float | None, typer.Option("--cfg", help="Guidance as ComfyUI counts it [default: 4]")]
Shift = Annotated[
    float | None, typer.Option("--shift", help="Schedule shift [default: its scheduler's, else --pipeline's, else 3]")
]
Sampler = Annotated[str | None, typer.Option("--sampler", help="euler, res_multistep or dpmpp_2m_sde [default: euler]")]
Scheduler = Annotated[
    str | None,
    typer.Option("--scheduler", help="simple, normal, sgm_uniform, beta, diffusers [default: simple]"),
]
Negative = Annotated[
    str | None, typer.Option("--negative", help="What the picture must not show; read where cfg is not 1.")
]
Strength = Annotated[
    str | None, typer.Option("--strength", help="Of the second stage; several: 0.1,0.15,0.25 [default: 0.15]")
]
StrengthAs = Annotated[
    str | None, typer.Option("--strength-as", help="What strength means [default: comfyui], or diffusers.")
]
RefinePreset = Annotated[str | None, typer.Option("--refine-preset", help="The same for the second stage.")]
RefineSteps = Annotated[int | None, typer.Option("--refine-steps", help="Steps of the second stage [default: 4]")]
RefineGuidance = Annotated[
    float | None, typer.Option("--refine-guidance", help="Its guidance, as diffusers counts [default: 0]")
]
RefineCfg = Annotated[float | None, typer.Option("--refine-cfg", help="Its guidance, as ComfyUI counts [default: 1]")]
RefineShift = Annotated[
    float | None, typer.Option("--refine-shift", help="Its shift [default: its scheduler's, else 3]")
]
RefineSampler = Annotated[str | None, typer.Option("--refine-sampler", help="Its sampler [default: euler]")]
RefineScheduler = Annotated[
    str | None,
    typer.Option("--refine-scheduler", help="Its scheduler [default: simple; diffusers with --strength-as diffusers]"),
]

EXPLAINED = """\b
Presets are what ComfyUI's stock templates of Z-Image are set to; other options change one setting of them:
  comfyui-base    25 steps, cfg 4, shift 3, res_multistep, simple
  comfyui-turbo    8 steps, cfg 1, shift 3, res_multistep, simple
  comfyui-refine   5 steps, cfg 1, shift 3, dpmpp_2m_sde, beta, strength 0.33
"""
