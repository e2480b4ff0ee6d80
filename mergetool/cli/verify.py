"""``mergetool verify``: is a merge what its recipe says, and does it make pictures?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console
from mergetool.cli.console import JsonOption, NoProgressOption
from mergetool.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from mergetool.verify.looking import Wish
    from mergetool.verify.pictures import PicturesReport
    from mergetool.verify.weights import WeightsReport

EXAMPLES = """\b
Examples:
  mergetool verify out.safetensors
  mergetool verify out.safetensors --pipeline ./Z-Image --refiner ./Z-Image-Turbo --report out.html
  mergetool verify out.safetensors --input tuned=/models/tuned.safetensors --no-images --json

Inputs are looked for under the names that the recipe records, then beside OUT; --input says where else one is.
Without --images or --no-images, pictures are made where that takes minutes: on a GPU, or for a small model.
"""


@console.command
def verify(
    output: Annotated[str, typer.Argument(help="A merge that mergetool made.", metavar="OUT")],
    inputs: Annotated[
        list[str] | None, typer.Option("--input", help="Where an input is now. Repeatable.", metavar="NAME=MODEL")
    ] = None,
    with_images: Annotated[
        bool | None, typer.Option("--images/--no-images", help="Make pictures, or stop after the weights.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write all of it as one HTML page.", metavar="FILE.html")] = None,
    refiner: Annotated[
        str | None, typer.Option(help="The model of the second stage [embedded: lab.turbo]", metavar="MODEL")
    ] = None,
    strength: Annotated[
        str, typer.Option(help="Of the second stage; several: 0.1,0.15,0.25. The first is judged.")
    ] = "0.15",
    strength_as: Annotated[str, typer.Option(help="What strength means: comfyui or diffusers.")] = "comfyui",
    refine_steps: Annotated[int, typer.Option(help="Steps of the second stage.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of the first stage.")] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance of the first stage, as diffusers counts it.")] = 3.0,
    shift: Annotated[float | None, typer.Option(help="Schedule shift [default: the first model's, else 6]")] = None,
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
    from mergetool.verify.looking import Wish

    wish = Wish(
        steps,
        guidance,
        shift,
        refiner,
        strength,
        strength_as,
        refine_steps,
        prompts,
        seeds,
        size,
        pipeline,
        text_encoder,
        tokenizer,
        vae,
        console.choice("--device", device, ("auto", "cpu", "cuda")),
    )
    examined = examine(
        output,
        dict(place(text) for text in inputs or ()),
        wish,
        with_images=with_images,
        report=report,
        clip=clip,
        threads=threads,
        overwrite=overwrite,
        shown=not (no_progress or as_json),
    )
    if as_json:
        console.print_json(examined.json())
    else:
        examined.print()
        if report is not None:
            console.heading("report", str(report))
    examined.require_passed()


@dataclass(frozen=True)
class Examined:
    """What `examine` found: ``left_out`` says why there are no pictures."""

    output: str
    weights: WeightsReport
    looked: PicturesReport | None
    left_out: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.weights.sound and (self.looked is None or self.looked.passed)

    def json(self) -> dict[str, Any]:
        from mergetool.verify import pictures

        seen = None if self.looked is None else pictures.summary(self.looked)
        return _json(self.weights) | {"pictures": seen, "left_out": self.left_out, "passed": self.passed}

    def print(self) -> None:
        _print(self.weights, self.seconds)
        _print_pictures(self.looked, self.left_out)

    def require_passed(self) -> None:
        """Raises CheckFailed unless all is as it should be."""
        if not self.weights.sound:
            raise CheckFailed(f"{self.output} is not what its recipe says.")
        if not self.passed:
            said = [verdict.name for verdict in self.looked.verdicts if not verdict.passed] if self.looked else []
            raise CheckFailed(f"{self.output} does not make the pictures it should ({', '.join(said)}).")


def examine(
    output: str,
    places: Mapping[str, str],
    wish: Wish,
    *,
    with_images: bool | None,
    report: Path | None = None,
    clip: Path | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    shown: bool = True,
) -> Examined:
    """Check a merge's weights, and its pictures where they are asked for, or with None where they take minutes."""
    from mergetool.compare import page
    from mergetool.verify import looking, pictures
    from mergetool.verify.report import render
    from mergetool.verify.scores import clip_scorer
    from mergetool.verify.weights import check_weights

    started = time.monotonic()
    if report is not None:
        page.require_target(report, overwrite=overwrite)
    with console.progress("weights", 100, shown=shown, unit="%") as bar:
        percent = 0

        def advance(done: int, total: int) -> None:
            nonlocal percent
            bar(100 * done // total - percent)
            percent = 100 * done // total

        weights = check_weights(output, inputs=places, threads=threads, progress=advance)
    looked, left_out = None, "--no-images"
    if with_images is not False:
        try:
            studio, look = looking.plan(output, weights.parents[weights.first], wish, patient=bool(with_images))
        except looking.NotLookedAt as reason:
            left_out = str(reason)
        else:
            left_out = ""
            scorer = None if clip is None else clip_scorer(clip)
            asked = pictures.evaluations(look, len(weights.parents))
            with console.progress("look", asked, shown=shown, unit="step") as bar:
                looked = pictures.check_pictures(weights.parents, output, studio, look, scorer=scorer, progress=bar)
    if report is not None:
        page.write(report, render(Path(output).name, weights, looked, left_out=left_out))
    return Examined(output, weights, looked, left_out, time.monotonic() - started)


def place(text: str) -> tuple[str, str]:
    """The name and the MODEL of ``--input NAME=MODEL``; raises UsageError."""
    name, equals, where = text.partition("=")
    if not (name and equals and where):
        raise UsageError(f'--input "{text}" is not NAME=MODEL, as in --input tuned=/models/tuned.safetensors.')
    return name, where


def _print(report: WeightsReport, seconds: float) -> None:
    from mergetool.compare.energies import relative

    console.heading("recipe", report.expression)
    for what, names in report.damage():
        console.heading("", f"{len(names)} {what}: {console.listed(names)}")
    for parent, found in report.distances.items():
        console.heading("", f"{100 * relative(found):.3g} % from {parent}, in the norm of all weights")
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
        console.heading("ok" if verdict.passed else "NO", f"{verdict.name}: {verdict.sentence}")


def _json(report: WeightsReport) -> dict[str, Any]:
    from mergetool.compare.energies import relative

    return {
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
