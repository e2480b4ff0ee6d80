"""The commands as functions: ``mergetool.merge``, ``diff``, ``sample``, ``verify``.

    import mergetool

    mergetool.merge("alkahest + 20 * (artshoot - 'z-image')", "out.safetensors", protect=["refiner"])
    mergetool.diff("alkahest", "turbo", "turbo.lora.safetensors", rank_thresh=0.995, exclude=["refiner"])
    picture = mergetool.sample("a blue circle on a gold background", base="lab.base", refiner="lab.turbo")[0].image
    assert mergetool.verify("out.safetensors", images=False).passed

Models are what the command line takes: registered names, paths, ``hf://`` addresses, ``lab.NAME``. Every error is a MergetoolError with
one sentence. ``progress=True`` shows a bar on stderr; a function is called with what is done and the total instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mergetool.errors import UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mergetool.compare.comparison import Report
    from mergetool.engine.worker import Outcome
    from mergetool.lora.extract import Extraction
    from mergetool.verify.pictures import PicturesReport
    from mergetool.verify.weights import WeightsReport

StrPath = str | os.PathLike[str]
Progress = bool | Callable[[int, int], None]
"""False for none, True for a bar on stderr, or a function of what is done and of the total."""


@dataclass(frozen=True)
class Merged:
    """A merge that was written to ``output``.

    ``tensors`` maps what was done ("merged", "protected: refiner", ...) to the output tensors that it was done to, ``left_out`` a name to why it is not
    in the output; ``warnings`` are what a user should know. ``outcome`` has what became of the delta in rounding, and what was capped.
    """

    output: Path
    expression: str
    tensors: Mapping[str, Sequence[str]]
    left_out: Mapping[str, str]
    warnings: Sequence[str]
    outcome: Outcome


def merge(
    expression: str,
    output: StrPath,
    *,
    protect: Sequence[str] = (),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_from: str | None = None,
    multipliers: Mapping[str, float | str | Fraction] | None = None,
    dtype: str | None = None,
    quant: str | None = None,
    scale_search: bool = False,
    layout: str | None = None,
    rounding: Literal["nearest", "stochastic", "error-feedback"] = "nearest",
    seed: int = 0,
    shard_size: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    non_finite: Literal["refuse", "keep"] = "refuse",
    skip_unmatched: bool = False,
    overwrite: bool = False,
    progress: Progress = False,
) -> Merged:
    """Merge checkpoints by an expression into ``output``, a .safetensors file or a folder; complete, or not at all.

    ``multipliers`` scales the change in groups, as ``--set`` does: ``{"layers": "linear(0.2,1)", "refiner": 0}``; a later entry wins. ``protect``,
    ``include`` and ``exclude`` are patterns of groups and tensors. Sizes are in bytes. Raises MergetoolError: ExpressionError, PatternError or
    UsageError for what is asked, InputMissing and DataError for inputs, OutputError, BusyError and StorageError for the output, NonFiniteError for
    NaN and infinity.
    """
    from mergetool.engine import device as devices
    from mergetool.engine import job
    from mergetool.recipe.groups import parse_setting
    from mergetool.recipe.options import Options

    options = Options(
        protect=_patterns(protect),
        include=_patterns(include),
        exclude=_patterns(exclude),
        multipliers=tuple(parse_setting(f"{pattern}={value}") for pattern, value in (multipliers or {}).items()),
        keep_from=keep_from,
        dtype=job.output_dtype(dtype),
        layout=layout,
        rounding=rounding,
        seed=seed,
        quant=quant,
        scale_search=scale_search,
    )
    with job.open_merge(expression, options, skip_unmatched=skip_unmatched) as plan:
        on = devices.choose(device, work=plan.bytes_read, memory=0)
        with _counting("merge", plan.bytes_read + plan.header.data_size, progress) as advance:
            outcome = job.run_merge(
                plan,
                Path(output),
                overwrite=overwrite,
                shard_size=shard_size,
                threads=threads,
                non_finite=non_finite,
                device=on,
                progress=advance,
            )
        return Merged(
            Path(output),
            str(plan.expression.graph),
            plan.reasons(),
            dict(plan.left_out),
            plan.warnings,
            outcome,
        )


def diff(
    base: str,
    variant: str,
    output: StrPath,
    *,
    rank: int = 0,
    rank_thresh: float = 0.95,
    rank_max: int | None = None,
    rule: Literal["energy", "fro", "sum", "ratio", "abs", "knee"] = "energy",
    budget: int = 0,
    min_dim: int = 32,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int | None = None,
    skip_unmatched: bool = False,
    overwrite: bool = False,
    progress: Progress = False,
) -> Extraction:
    """Take the difference ``variant - base`` as a LoRA, written to ``output``; the variant may be a LoRA itself.

    Options are those of the command; ``budget`` is in bytes, ``rank_max`` 64 where nothing is said and no budget given. Returns the rank, energy and residual of every
    matrix, and what was left out. Raises MergetoolError.
    """
    from mergetool.checkpoint.dtypes import output_dtype
    from mergetool.lora import on_device
    from mergetool.lora.extract import extract, open_diff
    from mergetool.lora.pairs import DiffOptions

    options = DiffOptions(
        rank=rank,
        rank_thresh=rank_thresh,
        rank_max=(0 if budget else 64) if rank_max is None else rank_max,
        rule=rule,
        budget=budget,
        min_dim=min_dim,
        include=_patterns(include),
        exclude=_patterns(exclude),
        dtype=output_dtype(dtype),
        seed=seed,
    )
    with (
        open_diff(base, variant, options, skip_unmatched=skip_unmatched) as pairing,
        _counting("diff", pairing.bytes_to_read(options), progress) as advance,
    ):
        return extract(
            pairing,
            Path(output),
            options,
            overwrite=overwrite,
            threads=threads,
            device=on_device.choose(device),
            progress=advance,
        )


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
    with _counting("sample", request.evaluations, progress, unit="step") as advance:
        made = session.make(studio, request, progress=advance)
    wanted = len(request.refinements) or 1
    return [Picture(fromarray(one.picture), one.parameters) for row in made for one in row[-wanted:]]


@dataclass(frozen=True)
class Verification:
    """Whether a merge is what its recipe says, and whether it makes pictures; ``left_out`` says why none were made."""

    weights: WeightsReport
    pictures: PicturesReport | None
    left_out: str

    @property
    def passed(self) -> bool:
        """Every check said yes."""
        return self.weights.sound and (self.pictures is None or self.pictures.passed)


def compare(
    base: str,
    variant: str,
    *,
    reference: str | None = None,
    reference_base: str | None = None,
    onto: str | None = None,
    multiplier: float | str = 1,
    target: float = 0.01,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = False,
) -> Report:
    """Measure how far ``variant`` lies from ``base``, part by part, in one pass, and advise a multiplier for their difference.

    ``reference`` - ``reference_base`` (``base`` without it) is a difference whose size is known to be right, ``target`` the wanted change as a
    share; ``onto`` is what the difference will be added to (``base`` without it). ``multiplier`` is a number, exact as text, or
    "recommended": that of the merge whose rounding is looked at.
    """
    from mergetool.compare import comparison
    from mergetool.engine import job
    from mergetool.recipe.options import Options

    size = multiplier if multiplier == comparison.RECOMMENDED else Fraction(str(multiplier))
    options = Options(include=_patterns(include), exclude=_patterns(exclude), dtype=job.output_dtype(dtype))
    with (
        comparison.open_comparison(
            base, variant, reference=reference, reference_base=reference_base, onto=onto, options=options
        ) as opened,
        _counting("compare", opened.bytes_read, progress) as advance,
    ):
        return comparison.compare(opened, multiplier=size, target=target, threads=threads, progress=advance)


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
    from mergetool.compare import page
    from mergetool.verify import looking, pictures
    from mergetool.verify.report import render
    from mergetool.verify.weights import check_weights

    if report is not None:
        page.require_target(Path(report), overwrite=overwrite)
    with _reporting("weights", progress) as reported:
        weights = check_weights(str(output), inputs=inputs, threads=threads, progress=reported)
    looked, left_out = None, "images=False"
    if images is not False:
        wish = looking.Wish(
            steps=steps,
            guidance=guidance,
            refiner=refiner,
            strength=repr(strength),
            pipeline=pipeline,
            device=device,
        )
        try:
            studio, look = looking.plan(str(output), weights.parents[weights.first], wish, patient=bool(images))
        except looking.NotLookedAt as reason:
            left_out = str(reason)
        else:
            left_out = ""
            asked = pictures.evaluations(look, len(weights.parents))
            with _counting("look", asked, progress, unit="step") as advance:
                looked = pictures.check_pictures(weights.parents, str(output), studio, look, progress=advance)
    if report is not None:
        page.write(Path(report), render(Path(output).name, weights, looked, left_out=left_out))
    return Verification(weights, looked, left_out)


def _patterns(given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str):
        raise UsageError(f'patterns are a list, as in ["{given}"], not one text.')
    return tuple(given)


@contextmanager
def _counting(word: str, total: int, progress: Progress, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """A function to call with what was done since the last call."""
    done = 0
    with _reporting(word, progress, unit) as report:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            report(done, total)

        yield advance


@contextmanager
def _reporting(word: str, progress: Progress, unit: str = "B") -> Iterator[Callable[[int, int], None]]:
    """A function to call with what is done and the total."""
    if progress is False:
        yield lambda done, total: None
    elif progress is True:
        from tqdm import tqdm

        with tqdm(desc=word, unit=unit, unit_scale=True) as bar:

            def show(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield show
    else:
        yield progress
