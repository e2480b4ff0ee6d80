"""``mergetool sample``: pictures from one model, or from two in a row, enlarged or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergetool.api.pictures import Sample, run_sample
from mergetool.cli import console
from mergetool.cli.parameters import Typed, command
from mergetool.cli.presets import presets
from mergetool.cli.report import CommandEvents

if TYPE_CHECKING:
    from mergetool.api.pictures import Drawn
    from mergetool.sampler.request import PictureRequest, PipelineStage, Stage
    from mergetool.sampler.settings import Prepared


EXAMPLES = """\b
Examples:
  mergetool sample "a blue circle on a gold background" --base lab.base --refiner lab.turbo -o circle.png
  mergetool sample "a knight in ornate blue and gold armor" --base ./Z-Image --refiner ./Z-Image-Turbo -o knight.png
  mergetool sample "a knight" --base merged.safetensors --pipeline ./Z-Image --refiner ./Z-Image-Turbo --strength 0.1,0.15,0.4 -o knights
  mergetool sample "a knight" --base "alkahest + 20*(tuned - base)" --refiner turbo -o knight.png
  mergetool sample "a knight" --base ./Z-Image-Turbo --preset comfyui-turbo --seed 123 --size 384x256 -o knight.png
  mergetool sample "a knight" --base z_image.safetensors --text-encoder text_encoders/qwen_3_4b.safetensors --tokenizer ./tokenizer --vae vae/ae.safetensors -o knight.png
  mergetool sample --prompts prompts.txt --seeds 1,2 --base ./Z-Image -o sheet
  mergetool sample "sharper" --init-image photo.png --refiner ./Z-Image-Turbo -o refined.png
  mergetool sample "a knight" --base ./Z-Image --refiner ./Z-Image-Turbo --upscale 4x-UltraSharp.safetensors -o knight.png

For several pictures mergetool makes a folder: each picture, a labelled contact sheet (sheet.png) and all parameters (pictures.json). The \
same seed gives the same picture.

"""
EXAMPLES += presets()


@command(Sample, prints=("as_json", "no_progress"))
def sample(typed: Typed) -> None:
    """Draw pictures with one model, or with two.

    The second model refines the pictures of the first. By default a base model takes 30 steps, then a few-step model such as Turbo refines at
    strength 0.15; a merge that is right looks right this way. An upscaler may enlarge what they drew; the picture before lies beside it.
    """
    with _SampleReport.shown(typed) as report:
        run_sample(typed.request(Sample), report, always_writes=True)


class _SampleReport(CommandEvents):
    """The report of a sample: the plan, and the files."""

    def plan(self, plan: Prepared, memory: int) -> None:
        """The stages."""
        self.json["notes"] = []
        if self.prints:
            _print_plan(plan.request, plan.device)
            if plan.enlargement is not None:
                third, (width, height) = plan.enlargement, plan.enlargement.enlarged(plan.request.size)
                console.heading("", f"stage 3  {third.model}: {third.architecture}, to {width} x {height}")

    def done(self, plan: Prepared, result: Drawn) -> None:
        """The files."""
        self.json |= {
            "written": [str(path) for path in result.paths],
            "pictures": [picture.parameters for row in result.made for picture in row],
        }
        if self.prints:
            console.heading(
                "done", f"{result.target}  {console.plural(len(result.paths), 'file')}  {result.seconds:.0f} s"
            )


def _print_plan(request: PictureRequest, device: str) -> None:
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


def _stage_line(stage: Stage | PipelineStage) -> str:
    from mergetool.sampler.request import PipelineStage

    evaluations = console.plural(stage.evaluations, "evaluation")
    if isinstance(stage, PipelineStage):
        return ", ".join(
            filter(None, (f"{stage.model}: {evaluations}", stage.guided, stage.shift, f"diffusers' {stage.kind}"))
        )
    return (
        f"{stage.model}: {evaluations}{stage.begins}, shift {stage.shift:g}, "
        f"{stage.guided} (cfg {stage.guidance + 1:g}), {stage.sampler}, {stage.scheduler}"
    )
