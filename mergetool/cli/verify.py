"""``mergetool verify``: is a merge what its recipe says, and does it make pictures?"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console
from mergetool.cli import stage_options as options
from mergetool.cli.console import JsonOption, NoProgressOption
from mergetool.errors import UsageError

if TYPE_CHECKING:
    from mergetool.verification.checking import Verification
    from mergetool.verification.pictures import PicturesReport
    from mergetool.verification.weights import WeightsReport

EXAMPLES = """\b
Examples:
  mergetool verify out.safetensors
  mergetool verify out.safetensors --pipeline ./Z-Image --refiner ./Z-Image-Turbo --report out.html
  mergetool verify out.safetensors --input tuned=/models/tuned.safetensors --no-images --json
  mergetool verify someone.safetensors --parents base.safetensors --pipeline ./Z-Image --report page.html

A file without recipe is judged by its pictures, and measured against --parents.
Inputs are looked for under the names that the recipe records, then beside OUT; --input says where else one is.
Without --images or --no-images, pictures are made where that takes minutes: on a GPU, or for a small model.
Of several strengths the first is judged.

"""
EXAMPLES += options.EXPLAINED


@console.command
def verify(
    output: Annotated[str, typer.Argument(help="A merge, or any model.", metavar="OUT")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Where an input is now. Repeatable.", metavar="NAME=MODEL")
    ] = None,
    parents: Annotated[
        list[str] | None,
        typer.Option(help="Model to measure a file without recipe against. Repeatable.", metavar="MODEL"),
    ] = None,
    with_images: Annotated[
        bool | None, typer.Option("--images/--no-images", help="Make pictures, or stop after the weights.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write all of it as one HTML page.", metavar="FILE.html")] = None,
    refiner: Annotated[
        str | None, typer.Option(help="The model of the second stage [embedded: lab.turbo]", metavar="MODEL")
    ] = None,
    strength: options.Strength = None,
    strength_as: options.StrengthAs = None,
    refine_preset: options.RefinePreset = None,
    refine_steps: options.RefineSteps = None,
    refine_guidance: options.RefineGuidance = None,
    refine_cfg: options.RefineCfg = None,
    refine_shift: options.RefineShift = None,
    refine_sampler: options.RefineSampler = None,
    refine_scheduler: options.RefineScheduler = None,
    preset: options.Preset = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    cfg: options.Cfg = None,
    shift: options.Shift = None,
    sampler: options.Sampler = None,
    scheduler: options.Scheduler = None,
    negative: options.Negative = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a prompt a line [default: 4 of mergetool's; embedded: 36]")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds for every prompt: 1,2,3 or 1-8.", metavar="LIST")] = "0",
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT [default: the model's]")] = None,
    clip: Annotated[
        Path | None, typer.Option(help="Folder of a CLIP model, to score how pictures fit prompts.")
    ] = None,
    pipeline: console.PipelineOption = None,
    text_encoder: console.TextEncoderOption = None,
    tokenizer: console.TokenizerOption = None,
    vae: console.VaeOption = None,
    device: console.DeviceOption = "auto",
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: all cores]", min=1, max=256)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
) -> None:
    """Derive every tensor of a merge again from its recipe, then look at its pictures beside its parents'.

    Weights first: byte by byte, NaN, protected tensors, distances from the parents. Then the same prompts and seeds for
    the parents and the merge, in one stage and two; noise, collapse, drift and lost prompts are measured and judged.
    Nothing is written but the report. Exit code 1 when a check says no.
    """
    from mergetool.sampler.settings import PartsOptions, StageOptions
    from mergetool.verification import checking
    from mergetool.verification.looking import Wish

    wish = Wish(
        StageOptions(None, preset, steps, guidance, cfg, shift, sampler, scheduler),
        StageOptions(
            refiner,
            refine_preset,
            refine_steps,
            refine_guidance,
            refine_cfg,
            refine_shift,
            refine_sampler,
            refine_scheduler,
            (),
            strength,
            strength_as,
        ),
        prompts,
        seeds,
        negative or "",
        size,
        PartsOptions(pipeline, text_encoder, tokenizer, vae),
        device,
    )
    found = checking.verify(
        output,
        dict(place(text) for text in inputs or ()),
        wish,
        partial(console.bar, shown=not (no_progress or as_json)),
        parents=parents or (),
        with_images=with_images,
        report=report,
        clip=clip,
        threads=threads,
        overwrite=overwrite,
    )
    if as_json:
        console.print_json(described(found))
    else:
        print_found(found)
        if report is not None:
            console.heading("report", str(report))
    found.require_passed()


def described(found: Verification) -> dict[str, Any]:
    """What ``--json`` has of it."""
    from mergetool.verification import pictures

    seen = None if found.pictures is None else pictures.summary(found.pictures)
    return _json(found.weights) | {"pictures": seen, "left_out": found.left_out, "passed": found.passed}


def print_found(found: Verification) -> None:
    """What was found, in lines."""
    _print(found.weights, found.seconds)
    _print_pictures(found.pictures, found.left_out)


def place(text: str) -> tuple[str, str]:
    """The name and the MODEL of ``--input NAME=MODEL``; raises UsageError."""
    name, equals, where = text.partition("=")
    if not (name and equals and where):
        raise UsageError(f'--input "{text}" is not NAME=MODEL, as in --input tuned=/models/tuned.safetensors.')
    return name, where


def _print(report: WeightsReport, seconds: float) -> None:
    from mergetool.comparison.energies import relative

    if report.derived:
        console.heading("recipe", report.expression)
    for what, names in report.damage():
        console.heading("", f"{len(names)} {what}: {console.listed(names)}")
    for parent, found in report.distances.items():
        console.heading("", f"{100 * relative(found):.3g} % from {parent}, in the norm of all weights")
    if not report.derived:
        looked = f"{console.plural(report.kept, 'tensor')} looked through for NaN and infinity"
        console.heading("weights", f"no recipe, not derived; {looked}  {seconds:.1f} s")
        return
    compared = (
        f"{report.merged} merged and {report.kept} kept tensors, {console.size(report.bytes_compared)} derived again"
    )
    console.heading("sound" if report.sound else "UNSOUND", f"{compared}  {seconds:.1f} s")


def _print_pictures(looked: PicturesReport | None, left_out: str) -> None:
    if looked is None:
        console.heading("look", f"no pictures: {left_out}")
        return
    look = looked.look
    asked = console.plural(len(look.shots), "picture")
    console.heading("look", f"{asked} of each model, {look.first.steps} steps at guidance {look.first.guidance:g}")
    for second in look.refinements:
        reached = second.levels()
        console.heading(
            "",
            f"then {second.model}: {console.plural(len(reached) - 1, 'evaluation')} from sigma {reached[0]:.3f} "
            f"(strength {second.strength:g}, {second.strength_as})",
        )
    for note in look.notes:
        console.heading("note", note)
    adherence = any(column.adherence is not None for column in looked.columns)
    console.table(
        ["pictures of", *(["adherence"] if adherence else []), "noise", "collapsed"],
        [
            [
                column.label,
                *([f"{100 * (column.adherence or 0):.0f} %"] if adherence else []),
                str(sum(m.noise for m in column.measures)),
                str(sum(m.collapsed for m in column.measures)),
            ]
            for column in looked.columns
        ],
    )
    for verdict in looked.verdicts:
        said = "not judged: " if verdict.passed is None else ""
        console.heading(
            {None: "?", True: "ok", False: "NO"}[verdict.passed], f"{verdict.name}: {said}{verdict.sentence}"
        )


def _json(report: WeightsReport) -> dict[str, Any]:
    from mergetool.comparison.energies import relative

    return {
        "derived": report.derived,
        "sound": report.sound,
        "expression": report.expression,
        "merged": report.merged,
        "kept": report.kept,
        "bytes_compared": report.bytes_compared,
        "changed": report.changed,
        "missing": report.missing,
        "extra": report.extra,
        "differing": report.differing,
        "non_finite": report.non_finite,
        "distances": {parent: relative(found) for parent, found in report.distances.items()},
    }
