"""``mergetool merge``: an affine combination of checkpoints, streamed to one output."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergetool.cli import console, merge_report
from mergetool.cli.console import (
    BundledOption,
    JsonOption,
    NoProgressOption,
    QuantOption,
    ScaleSearchOption,
    SkipUnmatchedOption,
    VerboseOption,
)
from mergetool.errors import UsageError

if TYPE_CHECKING:
    from mergetool.comparison.preflight import Preflight
    from mergetool.engine.reading import Method
    from mergetool.engine.running import Measure, NonFinite
    from mergetool.recipe.groups import Setting
    from mergetool.recipe.options import Options
    from mergetool.recipe.plan import Plan

EXAMPLES = """\b
Examples:
  mergetool merge "lab.alkahest + 1.5*(lab.striped - lab.base)" --protect refiner -o striped.safetensors
  mergetool merge "alkahest + 20 * (artshoot - 'z-image')" --protect refiner -o out.safetensors
  mergetool merge "alk + 171.1*(a - b) + 20*(c - d)" --set layers.0-9=0.5 --set v=0 -o out.safetensors
  mergetool merge "alk + 20*(a - b)" --set refiner=0 --set "layers=linear(0.2,1)" --set "layers.*.attention=2" --dry-run
  mergetool merge "0.5*'a.safetensors' + 0.5*'b.safetensors'" --layout diffusers --shard-size 5GB -o out-folder
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --protect refiner --dry-run
  mergetool merge "alkahest + 0.3 * (tuned - base)" --dtype fp8_e4m3 --rounding stochastic --seed 1 -o out.safetensors
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --quant fp8-scaled -o out-fp8.safetensors
  mergetool merge "turbo + 0.7 * lora('style.safetensors') - 0.2 * lora('other.safetensors')" -o baked.safetensors
  mergetool merge bridge.yaml --var m=20 -o outputs --dry-run
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --resume -o out.safetensors

lab.NAME are models that come with mergetool. Others are registered with `mergetool models add`; quoted paths and "hf://org/repo" work too. Quote what is more than
letters, digits, dots and _. Any finite multiplier is allowed; differences are taken first, in float32, then scaled.
PATTERN is a group that `mergetool inspect` lists (refiner, attention, ffn, q, layers.0-9 ...), a glob over tensor
or module names ("layers.*.attention"), re:REGEX, or what of a group is in one of those (layers.q, layers.0-9.ffn). SHAPE(FIRST,LAST) over the
blocks of one stack: linear, smooth, bell (LAST in the middle). `mergetool inspect MODEL` lists groups and presets.
"""


def _print_schema(wanted: bool) -> None:
    if wanted:
        from mergetool.recipe.schema import json_schema

        console.print_json(json_schema())
        raise typer.Exit


CONTEXT = {"allow_extra_args": True}  # to say what was meant by them


@console.command
def merge(
    context: typer.Context,
    expression: Annotated[
        str,
        typer.Argument(
            help="What to compute, as in: alkahest + 20 * (tuned - base); or a recipe file.",
            metavar="EXPRESSION|RECIPE.yaml",
        ),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help="FILE.safetensors, or FOLDER/ for a folder. Needed unless --dry-run. Of a recipe: the folder for its outputs.",
        ),
    ] = None,
    variables: Annotated[
        list[str] | None, typer.Option("--var", help="Set a variable of a recipe. Repeatable.", metavar="NAME=VALUE")
    ] = None,
    protect: Annotated[
        list[str] | None,
        typer.Option(help="Group or pattern taken bit for bit from the anchor. Repeatable.", metavar="PATTERN"),
    ] = None,
    keep_from: Annotated[
        str | None, typer.Option("--from", help="Take protected and excluded tensors from this model.", metavar="MODEL")
    ] = None,
    multipliers: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Scale the change in a group: 0 leaves the anchor, 1 is the expression; layers=linear(0.2,1) runs over "
            "depth, preset:NAME is a named set of those. Repeatable; later wins.",
            metavar="GROUP=MULT",
        ),
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Merge only these. Repeatable.", metavar="PATTERN")] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Do not merge these. Repeatable.", metavar="PATTERN")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, fp8_e4m3 or fp8_e5m2 [default: the anchor's]")
    ] = None,
    quant: QuantOption = None,
    scale_search: ScaleSearchOption = False,
    bundled: BundledOption = "keep",
    layout: Annotated[
        str | None, typer.Option(help="comfyui (single file) or diffusers [default: the anchor's]")
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(
            help="nearest, stochastic (a change too small to be stored comes through on average) or error-feedback (an "
            "element's rounding error goes to the next in its row)."
        ),
    ] = "nearest",
    seed: Annotated[int, typer.Option(help="Seed of --rounding stochastic: the same seed, the same bytes.", min=0)] = 0,
    shard_size: Annotated[
        str | None, typer.Option(help="Write a folder of shards no larger than this, as in 5GB.", metavar="SIZE")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: all cores]", min=1, max=256)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda (every GPU) or cuda:NUMBER; same bytes.")] = "auto",
    gpu_memory: Annotated[
        str | None, typer.Option(help="Most memory to take of each GPU [default: 80 % of what is free]", metavar="SIZE")
    ] = None,
    measure: Annotated[
        str, typer.Option(help="sample, all or off: on how much of it to measure what rounding did to the delta.")
    ] = "sample",
    reader: Annotated[str, typer.Option(help="auto, mmap or pread: how files are read; same bytes.")] = "auto",
    nonfinite: Annotated[str, typer.Option(help="refuse or keep NaN and infinity.")] = "refuse",
    skip_unmatched: SkipUnmatchedOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Merge models that do not look as if they belong together.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep what is finished when the run is stopped; the same command then goes on from there."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done to every tensor.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
    schema: Annotated[
        bool,
        typer.Option("--schema", callback=_print_schema, is_eager=True, help="Print the JSON schema of recipe files."),
    ] = False,
) -> None:
    """Merge checkpoints by an expression, streaming; memory stays small whatever their size.

    A recipe file (docs/recipes.md) holds models, expressions and options of one output or many; what is up to date is not made again.
    """
    from mergetool.checkpoint import dtypes
    from mergetool.cli import merge_recipe
    from mergetool.engine import device as devices
    from mergetool.ops.rounding import MODES
    from mergetool.recipe.options import Options

    if context.args:
        raise _several(expression, context.args)
    options = Options(
        protect=tuple(protect or ()),
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        multipliers=tuple(multiplier(text) for text in multipliers or ()),
        keep_from=keep_from,
        dtype=dtypes.output_dtype(dtype),
        layout=layout,
        rounding=console.choice("--rounding", rounding, MODES),
        seed=seed,
        quant=quant,
        scale_search=scale_search,
        bundled=bundled,
    )
    settings = Settings(
        shard_size=console.parse_size(shard_size) if shard_size else None,
        threads=threads,
        device=devices.named(device),
        gpu_memory=console.parse_size(gpu_memory) if gpu_memory else 0,
        measure=console.choice("--measure", measure, ("sample", "all", "off")),
        reader=console.choice("--reader", reader, ("auto", "mmap", "pread")),
        nonfinite=console.choice("--nonfinite", nonfinite, ("refuse", "keep")),
        skip_unmatched=skip_unmatched,
        force=force,
        overwrite=overwrite,
        resume=resume,
        dry_run=dry_run,
        as_json=as_json,
        shows_progress=not (no_progress or as_json),
        verbose=verbose,
    )
    if expression.lower().endswith((".yaml", ".yml")):
        if options != Options() or shard_size:
            raise UsageError(
                f"what is merged, and how, is said in {expression}; leave the options for that out, or write them there."
            )
        merge_recipe.perform(Path(expression), variables or (), output, settings)
        return
    if variables:
        raise UsageError("--var sets a variable of a recipe file; in an expression, write the number itself.")
    perform(expression, options, output, settings)


def _several(first: str, more: Sequence[str]) -> UsageError:
    """The error for an expression that is several arguments: one without quotes around it, or models without what to do with them."""
    from mergetool.recipe.expression import parse
    from mergetool.recipe.quoting import quote

    whole = " ".join([first, *more])
    try:
        parse(whole)
    except UsageError as error:
        names = [first, *more]
        if any(re.fullmatch(r"[-+*/()\d.,%]+", name) for name in names):
            return UsageError(f"the expression is one argument, in quotes; and {error}")
        mean = " + ".join(f"{Decimal(1) / len(names):.4g}*{quote(name)}" for name in names)
        return UsageError(
            f"the expression is one argument, in quotes, and there are {len(names)}: {', '.join(names)}; "
            f'say what to do with them: "{mean}" is their mean, "{quote(names[0])} + 0.5*({quote(names[-1])} - BASE)" adds what one has learned.'
        )
    return UsageError(f'the expression is one argument, in quotes: write "{whole}".')


@dataclass(frozen=True, slots=True)
class Settings:
    """How a merge is run and what is printed of it: options that were read, sizes in bytes."""

    shard_size: int | None = None
    threads: int | None = None
    device: str = "auto"
    gpu_memory: int = 0
    measure: Measure = "sample"
    reader: Method = "auto"
    nonfinite: NonFinite = "refuse"
    skip_unmatched: bool = False
    force: bool = False
    overwrite: bool = False
    resume: bool = False
    dry_run: bool = False
    as_json: bool = False
    shows_progress: bool = True
    verbose: bool = False


def perform(expression: str, options: Options, output: str | None, settings: Settings, *, bar: str = "merge") -> None:
    """Plan and run a merge, and print both."""
    from mergetool.engine import device as devices
    from mergetool.engine import job
    from mergetool.engine.memory import memory_needed

    if output is None and not settings.dry_run:
        raise UsageError("no output is named; add -o OUT.safetensors, or --dry-run to see the plan.")
    started = time.monotonic()
    target = None
    if output is not None:
        target = console.model_output(
            output,
            shown=not settings.as_json,
            layout=options.layout,
            shard_size=settings.shard_size,
            overwrite=settings.overwrite,
        )
    with job.open_merge(
        expression, options, fingerprints=not settings.dry_run, skip_unmatched=settings.skip_unmatched
    ) as plan:
        on = devices.choose(settings.device, work=plan.bytes_read, memory=settings.gpu_memory)
        memory = job.BASE_MEMORY + memory_needed(plan, settings.threads, on)
        if not settings.as_json:
            merge_report.print_plan(plan, memory, every_tensor=settings.dry_run or settings.verbose)
        checked = guard(plan, force=settings.force or settings.dry_run, shown=not settings.as_json)
        if settings.dry_run or target is None:
            if settings.as_json:
                console.print_json(merge_report.plan_json(plan, memory) | checked.record())
            return
        total = plan.bytes_read + plan.header.data_size
        with console.progress(bar, total, shown=settings.shows_progress, publishes=True) as advance:
            outcome = job.run_merge(
                plan,
                target,
                overwrite=settings.overwrite,
                shard_size=settings.shard_size,
                threads=settings.threads,
                method=settings.reader,
                non_finite=settings.nonfinite,
                device=on,
                measure=settings.measure,
                resume=settings.resume,
                progress=advance,
            )
        seconds = time.monotonic() - started
        if settings.as_json:
            console.print_json(
                merge_report.plan_json(plan, memory)
                | checked.record()
                | merge_report.outcome_json(plan, outcome, target, seconds)
            )
        else:
            merge_report.print_outcome(plan, outcome, target, seconds)


def guard(plan: Plan, *, force: bool, shown: bool) -> Preflight:
    """The preflight of ``plan``, printed where ``shown``; raises LineageError for an error in it, unless with ``force``."""
    from mergetool.comparison import preflight

    checked = preflight.check(plan)
    for finding in checked.findings:
        if shown and (force or not finding.is_error):
            console.heading(finding.level, finding.text)
    if not force:
        checked.refuse()
    return checked


def multiplier(text: str) -> Setting:
    """What one ``--set`` says; raises UsageError."""
    from mergetool.recipe.groups import parse_setting

    return parse_setting(text)
