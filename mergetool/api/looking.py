"""Pictures: made by one model or two, and of a merge beside its parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergetool.api.progress import Progress, StrPath, bars, counting

if TYPE_CHECKING:
    from PIL.Image import Image

    from mergetool.verification.checking import Verification


@dataclass(frozen=True)
class Picture:
    """A picture, and every parameter that made it."""

    image: Image
    parameters: Mapping[str, Any]


def sample(
    prompt: str | Sequence[str],
    *,
    base: str | None = None,
    refiner: str | None = None,
    steps: int = 30,
    guidance: float = 4.0,
    shift: float | None = None,
    negative: str = "",
    seeds: int | Sequence[int] = 0,
    size: tuple[int, int] | None = None,
    strength: float | Sequence[float] = 0.15,
    strength_as: Literal["comfyui", "diffusers"] = "comfyui",
    refine_steps: int = 4,
    refine_guidance: float = 0.0,
    init_image: StrPath | None = None,
    loras: Mapping[str, float] | None = None,
    refine_loras: Mapping[str, float] | None = None,
    pipeline: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    progress: Progress = False,
) -> list[Picture]:
    """Make pictures with one model, or refine them with a second one: of every prompt with every seed, in that order.

    With a ``refiner`` each picture is the last stage's, one for each ``strength``. ``size`` is (width, height), ``guidance`` as diffusers counts it,
    ``loras`` map a file to its strength. The same seed gives the same picture. Raises MergetoolError.
    """
    from PIL.Image import fromarray

    from mergetool.sampler import session, settings

    added, refine_added = (
        settings.loras([f"{path}:{value:g}" for path, value in (chosen or {}).items()])
        for chosen in (loras, refine_loras)
    )
    strengths = ",".join(repr(value) for value in ([strength] if isinstance(strength, int | float) else strength))
    start = None if init_image is None else session.read_picture(Path(init_image))
    studio = settings.studio(base or refiner or "", pipeline=pipeline, device=device)
    request = session.Request(
        settings.shots(
            [prompt] if isinstance(prompt, str) else prompt,
            [seeds] if isinstance(seeds, int) else seeds,
            negative,
            None,
            None,
        ),
        settings.picture_size(None if size is None else f"{size[0]}x{size[1]}", start, studio),
        None if base is None else settings.stage(base, steps, guidance, shift, added),
        ()
        if refiner is None
        else settings.refinements(
            refiner, refine_steps, refine_guidance, None, refine_added, strengths, strength_as=strength_as
        ),
        start,
    )
    with counting("sample", request.evaluations, progress, unit="step") as advance:
        made = session.make(studio, request, progress=advance)
    wanted = len(request.refinements) or 1
    return [Picture(fromarray(one.picture), one.parameters) for row in made for one in row[-wanted:]]


def verify(
    output: StrPath,
    *,
    inputs: Mapping[str, str] | None = None,
    images: bool | None = None,
    refiner: str | None = None,
    strength: float = 0.15,
    steps: int = 30,
    guidance: float = 3.0,
    pipeline: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    report: StrPath | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = False,
) -> Verification:
    """Derive every tensor of a merge again from its recipe, then look at its pictures beside its parents'.

    ``images`` True makes pictures, False does not, None where that takes minutes. ``inputs`` maps names of the recipe to where those models are now,
    ``report`` is an HTML file to write. What a check says no to is in the result; an exception is raised for what cannot be checked.
    """
    from mergetool.verification import checking
    from mergetool.verification.looking import Wish

    wish = Wish(
        steps=steps, guidance=guidance, refiner=refiner, strength=repr(strength), pipeline=pipeline, device=device
    )
    return checking.verify(
        str(output),
        inputs or {},
        wish,
        bars(progress),
        with_images=images,
        report=None if report is None else Path(report),
        threads=threads,
        overwrite=overwrite,
    )
