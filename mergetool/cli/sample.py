"""``mergetool sample``: pictures from one model, or from two in a row."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergetool.cli import console
from mergetool.cli.console import JsonOption, NoProgressOption
from mergetool.errors import UsageError

if TYPE_CHECKING:
    from mergetool.sampler.session import Request
    from mergetool.sampler.studio import Refinement, Stage

EXAMPLES = """\b
Examples:
  mergetool sample "a blue circle on a gold background" --base lab.base --refiner lab.turbo -o circle.png
  mergetool sample "a knight in ornate blue and gold armor" --base ./Z-Image --refiner ./Z-Image-Turbo -o knight.png
  mergetool sample "a knight in ornate blue and gold armor" --base merged.safetensors --pipeline ./Z-Image \\
      --refiner ./Z-Image-Turbo --strength 0.1,0.15,0.25,0.4,0.6 --size 1152x896 -o knights
  mergetool sample "a knight" --base z_image.safetensors --text-encoder qwen_3_4b.safetensors --tokenizer ./tokenizer \\
      --vae ae.safetensors -o knight.png
  mergetool sample --prompts prompts.txt --seeds 1,2,3 --base ./Z-Image -o sheet
  mergetool sample "sharper" --init-image photo.png --refiner ./Z-Image-Turbo -o refined.png

More than one picture makes a folder: each picture, a labelled contact sheet (sheet.png) and every parameter
(pictures.json). The same seed gives the same picture.
"""


@console.command
def sample(
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="The model of the first stage.", metavar="MODEL")] = None,
    refiner: Annotated[str | None, typer.Option(help="The model of the second stage.", metavar="MODEL")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="FILE.png, or a folder [default: sample.png or samples/]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the first stage.")] = 30,
    guidance: Annotated[float | None, typer.Option(help="Guidance as diffusers counts it [default: 4]")] = None,
    cfg: Annotated[float | None, typer.Option(help="Guidance as ComfyUI counts it: guidance + 1.")] = None,
    shift: Annotated[float | None, typer.Option(help="Schedule shift [default: the model's, else 6]")] = None,
    negative: Annotated[str, typer.Option(help="What the picture must not show; read where guidance is above 0.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of the first stage's noise.")] = 0,
    seeds: Annotated[str | None, typer.Option(help="Several: 1,2,3 or 1-8.", metavar="LIST")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT [default: the init image's, else the model's]")] = None,
    strength: Annotated[str, typer.Option(help="Of the second stage, 0 to 1; several: 0.1,0.15,0.25.")] = "0.15",
    strength_as: Annotated[str, typer.Option(help="What strength means: comfyui or diffusers.")] = "comfyui",
    refine_steps: Annotated[int, typer.Option(help="Steps of the second stage.")] = 4,
    refine_guidance: Annotated[float, typer.Option(help="Guidance of the second stage, as diffusers counts.")] = 0.0,
    refine_shift: Annotated[float | None, typer.Option(help="Its shift [default: the model's, else 3]")] = None,
    refine_prompt: Annotated[str | None, typer.Option(help="Its prompt [default: the same]")] = None,
    refine_seed: Annotated[int | None, typer.Option(help="Its seed [default: the one after]")] = None,
    init_image: Annotated[Path | None, typer.Option(help="Start the second stage from this picture.")] = None,
    handoff: Annotated[str, typer.Option(help="latent, or pixels for models of different families.")] = "latent",
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
    from mergetool.sampler import load, session, settings

    if guidance is not None and cfg is not None:
        raise UsageError("--guidance and --cfg are two ways to say one thing: give one of them.")
    started = time.monotonic()
    g = guidance if guidance is not None else 4.0 if cfg is None else max(0.0, cfg - 1.0)
    loras = settings.loras(lora or ()), settings.loras(refine_lora or ())
    start = None if init_image is None else session.read_picture(init_image)
    first = None if base is None else settings.stage(base, steps, g, shift, loras[0])
    refinements = (
        ()
        if refiner is None
        else settings.refinements(
            refiner, refine_steps, refine_guidance, refine_shift, loras[1], strength, strength_as=strength_as
        )
    )
    shots = settings.shots(
        [prompt] if prompt is not None else [] if prompts is None else session.read_prompts(prompts),
        settings.seeds(seeds) if seeds else [seed],
        negative,
        refine_prompt,
        refine_seed,
    )
    studio = settings.studio(
        base or refiner or "",
        pipeline=pipeline,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        vae=vae,
        device=console.choice("--device", device, ("auto", "cpu", "cuda")),
        dtype=dtype,
    )
    request = session.Request(
        shots,
        settings.picture_size(size, start, studio),
        first,
        refinements,
        start,
        console.choice("--handoff", handoff, ("latent", "pixels")),
        load.Components.find(refiner) if handoff == "pixels" and refiner else None,
    )
    many = len(request.shots) * (len(request.refinements) or 1) > 1
    target = output or Path("samples" if many else "sample.png")
    settings.require_target(target, many=many, overwrite=overwrite)
    if not as_json:
        _print_plan(request, studio.device)
    with console.progress("sample", request.evaluations, shown=not (no_progress or as_json), unit="step") as bar:
        made = session.make(studio, request, progress=bar)
    written = settings.write(made, target, many=many)
    if as_json:
        console.print_json(
            {"written": [str(path) for path in written], "pictures": [one.parameters for row in made for one in row]}
        )
        return
    console.heading("done", f"{target}  {console.plural(len(written), 'file')}  {time.monotonic() - started:.0f} s")


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


def _stage_line(stage: Stage | Refinement) -> str:
    reached = stage.levels()
    evaluations = console.plural(len(reached) - 1, "evaluation")
    return (
        f"{stage.model}: {evaluations} from sigma {reached[0]:.3f}, shift {stage.shift:g}, guidance {stage.guidance:g}"
    )
