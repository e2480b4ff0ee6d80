"""Pictures: made by one model or two, and of a merge beside its parents."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergetool.api.events import Progress, StrPath
from mergetool.api.progress import bars, counting, reporting

if TYPE_CHECKING:
    from PIL.Image import Image

    from mergetool.sampler.settings import PartsOptions
    from mergetool.verification.checking import Verification
    from mergetool.verification.replay import Replay


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
    preset: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    cfg: float | None = None,
    shift: float | None = None,
    sampler: str | None = None,
    scheduler: str | None = None,
    negative: str | None = None,
    seeds: int | Sequence[int] | None = None,
    size: tuple[int, int] | None = None,
    strength: float | Sequence[float] | None = None,
    strength_as: Literal["comfyui", "diffusers"] | None = None,
    refine_preset: str | None = None,
    refine_steps: int | None = None,
    refine_guidance: float | None = None,
    refine_cfg: float | None = None,
    refine_shift: float | None = None,
    refine_sampler: str | None = None,
    refine_scheduler: str | None = None,
    refine_prompt: str | None = None,
    refine_seed: int | None = None,
    init_image: StrPath | None = None,
    handoff: Literal["latent", "pixels"] | None = None,
    loras: Mapping[str, float] | None = None,
    refine_loras: Mapping[str, float] | None = None,
    pipeline: str | None = None,
    text_encoder: StrPath | None = None,
    tokenizer: StrPath | None = None,
    vae: StrPath | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "fp32", "bf16"] = "auto",
    progress: Progress = False,
) -> list[Picture]:
    """Make pictures with one model, or refine them with a second one: of every prompt with every seed, in that order.

    With a ``refiner`` each picture is the last stage's, one for each ``strength``. ``size`` is (width, height), ``guidance`` as diffusers counts it,
    ``cfg`` as ComfyUI does (guidance + 1), ``loras`` map a file to its strength; what is None has the default of the command line. The same seed
    gives the same picture. What was asked for and has no effect is a UserWarning. Raises MergetoolError.
    """
    from PIL.Image import fromarray

    from mergetool.sampler import settings
    from mergetool.sampler.parts import WeightedLora
    from mergetool.sampler.settings import SampleOptions, StageOptions

    added, refine_added = (
        tuple(WeightedLora(Path(path), value) for path, value in (chosen or {}).items())
        for chosen in (loras, refine_loras)
    )
    strengths = [strength] if isinstance(strength, int | float) else strength
    prepared = settings.prepare(
        SampleOptions(
            prompts=(prompt,) if isinstance(prompt, str) else tuple(prompt),
            seeds=None if seeds is None else (seeds,) if isinstance(seeds, int) else tuple(seeds),
            negative=negative,
            first=StageOptions(base, preset, steps, guidance, cfg, shift, sampler, scheduler, added),
            second=StageOptions(
                refiner,
                refine_preset,
                refine_steps,
                refine_guidance,
                refine_cfg,
                refine_shift,
                refine_sampler,
                refine_scheduler,
                refine_added,
                None if strengths is None else ",".join(map(repr, strengths)),
                strength_as,
            ),
            refine_prompt=refine_prompt,
            refine_seed=refine_seed,
            init_image=None if init_image is None else Path(init_image),
            handoff=handoff,
            size=None if size is None else f"{size[0]}x{size[1]}",
            parts=_parts(pipeline, text_encoder, tokenizer, vae),
            device=device,
            dtype=dtype,
        )
    )

    from mergetool.sampler import session
    from mergetool.sampler.studio import Studio

    studio = Studio.of(prepared)
    with counting("sample", prepared.request.evaluations, progress, unit="step") as advance:
        made = session.make(studio, prepared.request, progress=advance)
    for note in (*prepared.notes, *studio.notes):
        warnings.warn(note, stacklevel=2)
    wanted = len(prepared.request.refinements) or 1
    return [Picture(fromarray(one.picture), one.parameters) for row in made for one in row[-wanted:]]


def _parts(
    pipeline: str | None, text_encoder: StrPath | None, tokenizer: StrPath | None, vae: StrPath | None
) -> PartsOptions:
    from mergetool.sampler.settings import PartsOptions

    return PartsOptions(pipeline, *(None if path is None else Path(path) for path in (text_encoder, tokenizer, vae)))


def verify(
    output: StrPath,
    *,
    inputs: Mapping[str, str] | None = None,
    parents: Sequence[str] = (),
    images: bool | None = None,
    refiner: str | None = None,
    strength: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    pipeline: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    report: StrPath | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress = False,
) -> Verification:
    """Derive every tensor of a merge again from its recipe, then look at its pictures beside its parents'.

    A file without a recipe is measured against ``parents``, and judged by its pictures alone.

    ``images`` True makes pictures, False does not, None where that takes minutes. ``inputs`` maps names of the recipe to where those models are now,
    ``report`` is an HTML file to write. What a check says no to is in the result; an exception is raised for what cannot be checked.
    """
    from mergetool.sampler.settings import StageOptions
    from mergetool.verification import checking
    from mergetool.verification.looking import Wish

    wish = Wish(
        first=StageOptions(steps=steps, guidance=guidance),
        second=StageOptions(model=refiner, strength=None if strength is None else repr(strength)),
        parts=_parts(pipeline, None, None, None),
        device=device,
    )
    return checking.verify(
        str(output),
        inputs or {},
        wish,
        bars(progress),
        parents=parents,
        with_images=images,
        report=None if report is None else Path(report),
        threads=threads,
        overwrite=overwrite,
    )


def replay(
    output: StrPath,
    *,
    inputs: Mapping[str, str] | None = None,
    threads: int | None = None,
    progress: Progress = False,
) -> Replay:
    """Make a merge again from the recipe in its metadata, and compare every byte of the file or folder; nothing is written.

    ``inputs`` maps names of the recipe to where those models are now. What is not the same is in the result, with the reason.
    """
    from mergetool.verification.replay import replay as again

    with reporting("replay", progress, "%") as reported:
        return again(str(output), inputs=inputs or {}, threads=threads, progress=reported)
