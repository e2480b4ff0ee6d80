"""``mergetool convert``: the same model in another dtype, container, layout or number of files."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console
from mergetool.cli.console import (
    BundledOption,
    JsonOption,
    NoProgressOption,
    QuantOption,
    ScaleSearchOption,
    VerboseOption,
)
from mergetool.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mergetool.checkpoint.outputs import Target
    from mergetool.engine.fidelity import Fidelity
    from mergetool.engine.running import Outcome
    from mergetool.recipe.plan import Plan

EXAMPLES = """\b
Examples:
  mergetool convert lab.base -o base-fp8.safetensors --quant fp8-scaled
  mergetool convert turbo-nvfp4.safetensors -o turbo-bf16.safetensors
  mergetool convert z_image-Q8_0.gguf -o z_image.safetensors
  mergetool convert alkahest -o alkahest-fp8.safetensors --quant fp8-scaled --scale-search
  mergetool convert out.safetensors -o folder --layout diffusers --shard-size 5GB
  mergetool convert out.safetensors -o wrapped.safetensors --prefix model.diffusion_model.

Reads every container that merge reads: plain floats, ComfyUI's FP8 (old and new), int8, nvfp4 and mxfp8, BFL's FP8 and nvfp4, GGUF.
Without --dtype and --quant, quantised weights become BF16 and everything else keeps its dtype.
"""


@console.command
def convert(
    model: Annotated[str, typer.Argument(help="A registered name, a file, a folder, or hf://org/repo")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="FILE.safetensors, or FOLDER/ for a folder. Needed unless --dry-run."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16, fp32, fp8_e4m3 or fp8_e5m2 (a bare cast).")] = None,
    quant: QuantOption = None,
    scale_search: ScaleSearchOption = False,
    bundled: BundledOption = "keep",
    layout: Annotated[str | None, typer.Option(help="comfyui or diffusers [default: the model's]")] = None,
    prefix: Annotated[
        str | None, typer.Option(help='Before every tensor name; "" for none [default: the model\'s]')
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Write a folder of shards no larger than this, as in 5GB.", metavar="SIZE")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: all cores]", min=1, max=256)] = None,
    nonfinite: Annotated[str, typer.Option(help="refuse or keep NaN and infinity.")] = "refuse",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and stop.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Convert between dtypes, quantised containers, layouts and shards, streaming; says what it cost each layer."""
    from mergetool.checkpoint import dtypes
    from mergetool.engine import job
    from mergetool.recipe.options import Options
    from mergetool.recipe.quoting import quote

    if output is None and not dry_run:
        raise UsageError("no output is named; add -o OUT.safetensors, or --dry-run to see the plan.")
    non_finite = console.choice("--nonfinite", nonfinite, ("refuse", "keep"))
    options = Options(
        dtype=dtypes.output_dtype(dtype),
        quant=quant,
        scale_search=scale_search,
        layout=layout,
        prefix=prefix,
        bundled=bundled,
    )
    started = time.monotonic()
    shard_bytes = console.parse_size(shard_size) if shard_size else None
    target = None
    if output is not None:
        target = console.model_output(
            output, shown=not as_json, layout=layout, shard_size=shard_bytes, overwrite=overwrite
        )
    with job.open_merge(quote(model), options) as plan:
        if not as_json:
            _print_plan(model, plan)
        if dry_run or target is None:
            if as_json:
                console.print_json(_plan_json(plan))
            return
        total = plan.bytes_read + plan.header.data_size
        with console.progress("convert", total, shown=not (no_progress or as_json), publishes=True) as bar:
            outcome = job.run_merge(
                plan,
                target,
                overwrite=overwrite,
                shard_size=shard_bytes,
                threads=threads,
                non_finite=non_finite,
                compared=True,
                progress=bar,
            )
        seconds = time.monotonic() - started
        if as_json:
            console.print_json(_as_json(plan, outcome, target, seconds))
        else:
            _print_outcome(plan, outcome, target, seconds, verbose=verbose)


def _print_plan(model: str, plan: Plan) -> None:
    kinds: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.constant is None:
            kinds[tensor.stored_as] = kinds.get(tensor.stored_as, 0) + 1
    stored = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.heading("plan", f"{model}: {plan.layout} layout, {stored}, {console.size(plan.header.file_size)}")
    if plan.left_out:
        names = console.listed([f"{name} ({reason})" for name, reason in plan.left_out])
        console.heading("", f"{len(plan.left_out)} left out: {names}")
    for warning in plan.warnings:
        console.heading("note", warning)


def _print_outcome(plan: Plan, outcome: Outcome, target: Target, seconds: float, *, verbose: bool) -> None:
    changed = {name: found for name, found in outcome.errors.items() if found.error}
    exact = len(outcome.errors) - len(changed)
    if changed:
        console.heading("error", f"of {console.plural(len(changed), 'tensor')} that rounding changed")
        rows = list(_by_group(plan, changed).items()) if not verbose else list(changed.items())
        console.table(
            ["tensor" if verbose else "group", "relative error", "worst element", "SNR dB"],
            ([name, f"{found.relative:.2e}", f"{found.worst:.2e}", f"{found.snr_db:.1f}"] for name, found in rows),
        )
        worst = max(changed, key=lambda name: changed[name].relative)
        console.heading("", f"most: {worst}, {changed[worst].relative:.2e}")
    if exact:
        console.heading("", f"{console.plural(exact, 'tensor')} unchanged by rounding")
    if outcome.search_gain is not None:
        console.heading("", f"scale search: {1 - outcome.search_gain:.1%} less squared error than amax")
    for counts, what in ((outcome.capped, "beyond the dtype and capped"), (outcome.non_finite, "NaN or infinite")):
        if counts:
            names = [f"{name} ({count})" for name, count in sorted(counts.items())]
            console.heading("", f"{sum(counts.values())} elements {what}: {console.listed(names)}")
    console.heading("done", f"{target}  {console.size(plan.header.file_size)}  {seconds:.1f} s")


def _by_group(plan: Plan, errors: Mapping[str, Fidelity]) -> dict[str, Fidelity]:
    """The errors of each group that has some; groups overlap."""
    from mergetool.engine.fidelity import Fidelity

    anatomy = plan.inputs[0].anatomy
    members: dict[str, list[Fidelity]] = {group: [] for group in anatomy.family.group_names(anatomy)}
    for tensor in plan.tensors:
        parts = [anatomy.parts[step.part] for step in tensor.steps if step.part in anatomy.parts]
        groups = {group for part in parts for group in anatomy.family.groups(part.name, part.shape)}
        for group in groups if tensor.name in errors else ():
            members[group].append(errors[tensor.name])
    return {group: Fidelity.total(found) for group, found in members.items() if found}


def _as_json(plan: Plan, outcome: Outcome, target: Target, seconds: float) -> dict[str, Any]:
    return {
        **_plan_json(plan),
        "output": str(target.path),
        "bytes_written": plan.header.file_size,
        "seconds": round(seconds, 3),
        "errors": {
            name: {
                "relative_frobenius": found.relative,
                "worst": found.worst,
                "snr_db": found.snr_db if found.error else None,
            }
            for name, found in outcome.errors.items()
        },
        "search_gain": outcome.search_gain,
        "capped": dict(sorted(outcome.capped.items())),
        "non_finite": dict(sorted(outcome.non_finite.items())),
    }


def _plan_json(plan: Plan) -> dict[str, Any]:
    return {
        "bytes_to_write": plan.header.file_size,
        "layout": plan.layout,
        "prefix": plan.prefix,
        "tensors": {tensor.name: tensor.stored_as for tensor in plan.tensors if tensor.constant is None},
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out],
        "warnings": list(plan.warnings),
    }
