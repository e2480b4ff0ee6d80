"""``mergetool sample``: pictures from one model, or from two in a row."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergetool.cli import console
from mergetool.cli import stage_options as options
from mergetool.cli.console import JsonOption, NoProgressOption
from mergetool.errors import UsageError

if TYPE_CHECKING:
    from mergetool.sampler.request import Request, Stage

EXAMPLES = """\b
Examples:
  mergetool sample "a blue circle on a gold background" --base lab.base --refiner lab.turbo -o circle.png
  mergetool sample "a knight in ornate blue and gold armor" --base ./Z-Image --refiner ./Z-Image-Turbo -o knight.png
  mergetool sample "a knight in ornate blue and gold armor" --base merged.safetensors --pipeline ./Z-Image \\
      --refiner ./Z-Image-Turbo --strength 0.1,0.15,0.25,0.4,0.6 --size 1152x896 -o knights
  mergetool sample "a knight" --base ./Z-Image-Turbo --preset comfyui-turbo --seed 123 -o knight.png
  mergetool sample "a knight" --base z_image.safetensors --text-encoder qwen_3_4b.safetensors --tokenizer ./tokenizer \\
      --vae ae.safetensors -o knight.png
  mergetool sample --prompts prompts.txt --seeds 1,2,3 --base ./Z-Image -o sheet
  mergetool sample "sharper" --init-image photo.png --refiner ./Z-Image-Turbo -o refined.png

More than one picture makes a folder: each picture, a labelled contact sheet (sheet.png) and every parameter
(pictures.json). The same seed gives the same picture.

"""
EXAMPLES += options.EXPLAINED


@console.command
def sample(
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="The model of the first stage.", metavar="MODEL")] = None,
    refiner: Annotated[str | None, typer.Option(help="The model of the second stage.", metavar="MODEL")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="FILE.png, or a folder [default: sample.png or samples/]")
    ] = None,
    preset: options.Preset = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    cfg: options.Cfg = None,
    shift: options.Shift = None,
    sampler: options.Sampler = None,
    scheduler: options.Scheduler = None,
    negative: options.Negative = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first stage's noise [default: 0]")] = None,
    seeds: Annotated[str | None, typer.Option(help="Several: 1,2,3 or 1-8.", metavar="LIST")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT [default: the init image's, else the model's]")] = None,
    strength: options.Strength = None,
    strength_as: options.StrengthAs = None,
    refine_preset: options.RefinePreset = None,
    refine_steps: options.RefineSteps = None,
    refine_guidance: options.RefineGuidance = None,
    refine_cfg: options.RefineCfg = None,
    refine_shift: options.RefineShift = None,
    refine_sampler: options.RefineSampler = None,
    refine_scheduler: options.RefineScheduler = None,
    refine_prompt: Annotated[str | None, typer.Option(help="Its prompt [default: the same]")] = None,
    refine_seed: Annotated[int | None, typer.Option(help="Its seed [default: the one after]")] = None,
    init_image: Annotated[Path | None, typer.Option(help="Start the second stage from this picture.")] = None,
    handoff: Annotated[
        str | None, typer.Option(help="latent, or pixels for models with different VAEs [default: latent]")
    ] = None,
    lora: Annotated[list[str] | None, typer.Option(help="PATH:STRENGTH on --base. Repeatable.")] = None,
    refine_lora: Annotated[list[str] | None, typer.Option(help="PATH:STRENGTH on --refiner. Repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt a line.")] = None,
    pipeline: console.PipelineOption = None,
    text_encoder: console.TextEncoderOption = None,
    tokenizer: console.TokenizerOption = None,
    vae: console.VaeOption = None,
    device: console.DeviceOption = "auto",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or auto: fp32 for small models, bf16 for large.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing pictures.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
) -> None:
    """Make pictures with one model, or refine them with a second one: the check that a merge is right.

    The default is the guide's: 30 steps of a base model, then a few-step model at strength 0.15.
    """
    from mergetool.sampler import settings, written
    from mergetool.sampler.inputs import read_prompts
    from mergetool.sampler.parts import WeightedLora
    from mergetool.sampler.settings import PartsOptions, SampleOptions, StageOptions

    if prompt is not None and prompts is not None:
        raise UsageError("there are a prompt and --prompts: give one of them.")
    if seed is not None and seeds is not None:
        raise UsageError("--seed and --seeds are two ways to say one thing: give one of them.")
    started = time.monotonic()
    first = StageOptions(
        base, preset, steps, guidance, cfg, shift, sampler, scheduler, tuple(map(WeightedLora.parse, lora or ()))
    )
    second = StageOptions(
        refiner,
        refine_preset,
        refine_steps,
        refine_guidance,
        refine_cfg,
        refine_shift,
        refine_sampler,
        refine_scheduler,
        tuple(map(WeightedLora.parse, refine_lora or ())),
        strength,
        strength_as,
    )
    prepared = settings.prepare(
        SampleOptions(
            prompts=read_prompts(prompts) if prompts is not None else () if prompt is None else (prompt,),
            seeds=settings.seeds(seeds) if seeds is not None else None if seed is None else (seed,),
            negative=negative,
            first=first,
            second=second,
            refine_prompt=refine_prompt,
            refine_seed=refine_seed,
            init_image=init_image,
            handoff=handoff,
            size=size,
            parts=PartsOptions(pipeline, text_encoder, tokenizer, vae),
            device=device,
            dtype=dtype,
        )
    )
    request = prepared.request
    target = output or Path("samples" if request.many else "sample.png")
    written.require_target(target, many=request.many, overwrite=overwrite)

    from mergetool.sampler import session  # torch and the libraries of models: what could be wrong was told before
    from mergetool.sampler.studio import Studio

    studio = Studio.of(prepared)
    if not as_json:
        _print_plan(request, studio.device)
        for note in prepared.notes:
            console.heading("note", note)
    with console.progress("sample", request.evaluations, shown=not (no_progress or as_json), unit="step") as bar:
        made = session.make(studio, request, progress=bar)
    paths = written.write(made, target, many=request.many)
    if as_json:
        console.print_json(
            {
                "written": [str(path) for path in paths],
                "notes": [*prepared.notes, *studio.notes],
                "pictures": [one.parameters for row in made for one in row],
            }
        )
        return
    for note in studio.notes:
        console.heading("note", note)
    console.heading("done", f"{target}  {console.plural(len(paths), 'file')}  {time.monotonic() - started:.0f} s")


def _print_plan(request: Request, device: str) -> None:
    width, height = request.size
    pictures = console.plural(len(request.shots), "picture")
    console.heading(
        "plan", f"{pictures} of {width} x {height} on {device}, {console.plural(request.evaluations, 'evaluation')}"
    )
    if request.first is not None:
        console.heading("", f"stage 1  {_stage_line(request.first)}")
    for refinement in request.refinements:
        console.heading(
            "", f"stage 2  {_stage_line(refinement)} · strength {refinement.strength:g} ({refinement.strength_as})"
        )


def _stage_line(stage: Stage) -> str:
    evaluations = console.plural(stage.evaluations, "evaluation")
    return (
        f"{stage.model}: {evaluations} from sigma {stage.levels()[0]:.3f}, shift {stage.shift:g}, "
        f"guidance {stage.guidance:g} (cfg {stage.guidance + 1:g}), {stage.sampler}, {stage.scheduler}"
    )
