"""``mergetool diff``: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mergetool.cli import console, diff_outputs, diff_ranks, loads
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption

if TYPE_CHECKING:
    from mergetool.lora.extract import Extraction
    from mergetool.lora.pairs import Pair, Pairing
    from mergetool.options.differences import DiffOptions

EXAMPLES = """\b
Examples:
  mergetool diff --base lab.base --variant lab.striped --rank-thresh 0.995 --exclude refiner
  mergetool diff --base alkahest --variant turbo --rank-thresh 0.995 --exclude refiner
  mergetool diff --base base.safetensors --variant tuned.safetensors --rank 32 -o tuned.lora.safetensors
  mergetool diff --base z-image --variant ./tuned-folder --include attention --include ffn --rank-max 128
  mergetool diff --base alkahest --variant turbo --budget 300MB --spectra turbo.spectra.safetensors
  mergetool diff --base alkahest --variant turbo --rule ratio --rank-thresh 0.05 --rank-max 0
  mergetool diff --base z-image --variant a.safetensors --variant2 b-lora.safetensors -o common.safetensors
  mergetool diff --base z-image --variant a.safetensors --variant2 b.safetensors --union --weights 1,0.5 -o both.safetensors
  mergetool diff --base z-image --variant tuned --full tuned-full.safetensors --full-layer embedder --checkpoint check.safetensors

A variant may be a LoRA, or a PEFT folder, in any spelling: its change to --base is then the difference. What two differences have in
common, their union and the orthogonal part are defined in docs/lora-sets.md.

\b
RULE is what --rank-thresh t means; s1 >= s2 >= ... are the singular values of one matrix of the difference:
  energy  the fewest r with (s1^2 + ... + sr^2) / (sum of all s^2) >= t
  fro     the fewest r with the square root of that share >= t
  sum     the fewest r with (s1 + ... + sr) / (sum of all s) >= t
  ratio   all s > t * s1
  abs     all s > t
  knee    those before the point of the curve that is furthest below its chord; no t

For energy and fro the pair that is stored, already rounded, reaches t. sum and knee decompose every matrix whole.

PATTERN is a group that `mergetool inspect` lists (refiner, attention, ffn, q, layers.0-9 ...), a glob over tensor
names ("layers.*.attention.*") or re:REGEX.
"""


@console.command
def diff(
    base: Annotated[str, typer.Option(help="The model the LoRA will be loaded on.", metavar="MODEL")],
    variant: Annotated[
        str, typer.Option(help="The model that base + LoRA should become, or a LoRA on the base.", metavar="MODEL")
    ],
    variant2: Annotated[
        str | None, typer.Option(help="Keep what the differences to both variants have in common.", metavar="MODEL")
    ] = None,
    union: Annotated[
        bool, typer.Option("--union", help="With --variant2: both, and what they share only once.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="With --union: how much of what each has alone.", metavar="W1,W2")
    ] = "1,1",
    orthogonal: Annotated[
        bool, typer.Option("--orthogonal", help="With --variant2: what of --variant is orthogonal to it.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="FILE.safetensors [default: VARIANT-minus-BASE.safetensors, here]"),
    ] = None,
    rank: Annotated[int, typer.Option(help="The same rank for every matrix; 0 chooses by --rank-thresh.")] = 0,
    rank_thresh: Annotated[
        float | None,
        typer.Option(
            help="What to keep of each matrix: its share of the energy (sum of squared singular values), or as --rule says. "
            "[default: 0.95; none for ratio and abs]",
            show_default=False,
        ),
    ] = None,
    rank_max: Annotated[
        int | None,
        typer.Option(help="Largest rank of a matrix; 0 for no cap. [default: 64; 0 with --budget]", show_default=False),
    ] = None,
    rule: Annotated[
        str, typer.Option(help="energy, fro, sum, ratio, abs or knee; see below.", metavar="RULE")
    ] = "energy",
    budget: Annotated[
        str | None,
        typer.Option(help="Size of the file, e.g. 300MB: the ranks with the least total error.", metavar="SIZE"),
    ] = None,
    spectra: Annotated[
        str | None,
        typer.Option(
            help="FILE.safetensors to keep what was found in: the next run, at another threshold, rank or budget, need not search."
        ),
    ] = None,
    min_dim: Annotated[int, typer.Option(help="Leave out matrices with fewer rows or columns.")] = 32,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave these out. Repeatable.", metavar="PATTERN")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Take only these. Repeatable.", metavar="PATTERN")] = None,
    dtype: Annotated[str, typer.Option(help="What the factors are stored in: bf16, fp16 or fp32.")] = "bf16",
    full: Annotated[
        str | None,
        typer.Option(
            help="FILE.safetensors for ComfyUI: biases, norms and what has no factors, stored whole. Load it beside the LoRA."
        ),
    ] = None,
    full_layer: Annotated[
        list[str] | None,
        typer.Option(help="Store these matrices whole, in --full. Repeatable.", metavar="PATTERN"),
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="FILE.safetensors to write the base with what was stored added to.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random starting directions.")] = 0,
    threads: Annotated[int | None, typer.Option(help="Matrices worked on at once [default: all cores]", min=1)] = None,
    reader: Annotated[str, typer.Option(help="auto, mmap or pread: how files are read; same bytes.")] = "auto",
    device: console.DeviceOption = "auto",
    gpu_memory: Annotated[
        str | None, typer.Option(help="GPU memory to use, e.g. 6GB [default: 80 % of what is free]", metavar="SIZE")
    ] = None,
    skip_unmatched: console.SkipUnmatchedOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be decomposed, and stop.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Take the difference variant - base as a LoRA for ComfyUI and diffusers.

    A rank is chosen for every matrix by a certificate: the kept singular values hold at least --rank-thresh of the
    energy of its whole spectrum, unless --rank-max stops it first, which is said. With --budget the ranks are those that
    leave the least error of all matrices together in a file of that size.
    """
    from mergetool.lora import on_device
    from mergetool.lora.extract import extract, on_the_cpu, open_diff
    from mergetool.options.differences import DiffOptions, RuleName

    named = partial(console.lora_output, shown=not as_json)
    options = DiffOptions(
        rank=rank,
        rank_thresh=rank_thresh,
        rank_max=rank_max,
        rule=cast(RuleName, rule),
        budget=budget,
        min_dim=min_dim,
        include=include or (),
        exclude=exclude or (),
        dtype=dtype,
        seed=seed,
        variant2=variant2,
        union=union,
        weights=diff_outputs.weights(weights),
        orthogonal=orthogonal,
        full=None if full is None else named(full),
        full_layer=full_layer or (),
        spectra=None if spectra is None else named(spectra),
    )
    full_path, spectra_path = (None if name is None else Path(name) for name in (options.full, options.spectra))
    method = console.choice("--reader", reader, ("auto", "mmap", "pread"))
    target_device = on_device.choose(device)
    memory = console.parse_size(gpu_memory) if gpu_memory else 0
    started = time.monotonic()
    target = named(output or _default_output(base, variant))
    checkpoint_path = None if checkpoint is None else named(checkpoint, what="--checkpoint")
    with open_diff(base, variant, options, skip_unmatched=skip_unmatched) as pairing:
        if not as_json:
            print_pairing(pairing, verbose=verbose or dry_run)
            diff_outputs.print_operands(pairing, options)
        if dry_run:
            if as_json:
                console.print_json(pairing_json(pairing))
            return
        if checkpoint_path is not None:
            diff_outputs.check_checkpoint(
                checkpoint_path, (target, full_path, spectra_path), pairing, overwrite=overwrite
            )
        only = on_the_cpu(options, pairing) if target_device else ""
        if only and not as_json:
            console.heading("note", f"{only} works on the CPU; the device is not used")
        shown = not (no_progress or as_json)
        reads = pairing.bytes_to_read(options)
        with console.progress("diff", reads, shown=shown, publishes=checkpoint_path is None) as bar:
            found = extract(
                pairing,
                target,
                options,
                overwrite=overwrite,
                threads=threads,
                method=method,
                device=target_device,
                memory=memory,
                progress=bar,
            )
        if checkpoint_path is not None:
            stored = [target, full_path] if full_path is not None and found.whole else [target]
            diff_outputs.bake(base, stored, checkpoint_path, overwrite=overwrite, threads=threads, shown=shown)
        seconds = time.monotonic() - started
        if as_json:
            note = {"note": f"{only} works on the CPU; the device is not used"} if only else {}
            console.print_json(
                pairing_json(pairing)
                | note
                | extraction_json(found, options, spectra_path, target, seconds)
                | {"loading": loads.as_json(loads.of_written(target, pairing.base.anatomy.family))}
                | diff_outputs.whole_json(found, full_path, checkpoint_path, pairing)
            )
        else:
            print_extraction(
                found, options, pairing, target, seconds, full=full_path, checkpoint=checkpoint_path, verbose=verbose
            )
            if spectra_path is not None:
                diff_ranks.print_spectra(found, spectra_path)


def _default_output(base: str, variant: str) -> Path:
    from mergetool.recipe.provenance import display_names

    names = display_names([base, variant])
    return Path(f"{names[variant]}-minus-{names[base]}.safetensors")


def print_pairing(pairing: Pairing, *, verbose: bool) -> None:
    from mergetool.lora.pairs import UNCHANGED

    reasons: dict[str, list[str]] = {}
    for pair in pairing.pairs:
        reasons.setdefault(_action(pair), []).append(pair.name)
    for name, reason in pairing.left_out:
        reasons.setdefault(reason, []).append(name)
    family = pairing.base.anatomy.family.name
    counts = " · ".join(f"{len(names)} {reason}" for reason, names in reasons.items())
    console.heading("pairs", f"{family}, {len(pairing.pairs) + len(pairing.left_out)} parameters · {counts}")
    for warning in pairing.warnings:
        console.heading("warn", warning)
    if verbose:
        for reason, names in reasons.items():
            for name in names:
                console.heading("", f"{name}  {reason}")
        return
    shown = [f"{name} ({reason})" for name, reason in pairing.left_out if reason != UNCHANGED]
    if shown:
        console.heading("", f"{len(shown)} left out: {console.listed(shown)}")


def _action(pair: Pair) -> str:
    """What is done with a pair, in words."""
    return f"{pair.reason}, stored whole" if pair.whole else pair.reason or "decomposed"


def print_extraction(
    found: Extraction,
    options: DiffOptions,
    pairing: Pairing,
    target: Path,
    seconds: float,
    *,
    full: Path | None,
    checkpoint: Path | None,
    verbose: bool,
) -> None:
    diff_ranks.print_ranks(found, options, target, verbose=verbose)
    diff_outputs.print_shared(found.layers, pairing)
    for reason, energies in found.skipped.items():
        share = 100 * sum(energies.values()) / found.total if found.total else 0.0
        names = sorted(energies, key=lambda name: -energies[name])
        # With two variants there is one difference that was looked for, and another whose energy is known.
        unsaid = reason == "unchanged" or pairing.second is not None
        detail = "" if unsaid else f", {share:.2g} % of the difference"
        console.heading(
            "", f"{len(names)} {reason}{detail}: {console.listed(names, most=len(names) if verbose else 2)}"
        )
    if verbose:
        for layer in found.layers:
            console.heading(
                "",
                f"{layer.name}  rank {layer.rank}  energy {layer.energy:.5f}  residual {layer.residual:.2%}  {layer.method}",
            )
    console.heading("done", f"{target}  {console.size(target.stat().st_size)}  {seconds:.1f} s")
    loads.print_all(loads.of_written(target, pairing.base.anatomy.family), verbose=verbose)
    diff_outputs.print_whole(found, full, verbose=verbose)
    base = pairing.base.name
    if checkpoint is not None:
        console.heading("", f"{checkpoint}  {console.size(checkpoint.stat().st_size)}  {base} with it added")
    console.heading("next", f"load it at strength 1 on {base}; at other strengths it moves part of the way, or past")


def pairing_json(pairing: Pairing) -> dict[str, Any]:
    return {
        "base": pairing.base.name,
        "variant": pairing.variant.name,
        "family": pairing.base.anatomy.family.name,
        "bytes_read": pairing.bytes_read,
        "pairs": [{"name": pair.name, "action": _action(pair)} for pair in pairing.pairs],
        "left_out": [{"name": name, "reason": reason} for name, reason in pairing.left_out],
        "warnings": list(pairing.warnings),
    }


def extraction_json(
    found: Extraction, options: DiffOptions, spectra: Path | None, target: Path, seconds: float
) -> dict[str, Any]:
    return {
        "output": str(target),
        "ranks": {
            "rank": options.rank,
            "budget": options.budget_bytes,
            "rule": None if options.rank or options.budget else options.rule,
            "rank_thresh": None if options.rank or options.budget or options.rule == "knee" else options.threshold,
            "rank_max": options.cap,
        },
        "spectra": None if spectra is None else {"file": str(spectra), "searched": found.searched},
        "bytes_written": target.stat().st_size,
        "seconds": round(seconds, 3),
        "layers": [
            {
                "name": layer.name,
                "shape": list(layer.shape),
                "rank": layer.rank,
                "energy": layer.energy,
                "residual": layer.residual,
                "capped": layer.capped,
                "rank_wanted": layer.wanted,
                "below_threshold_as_stored": layer.missed,
                "energy_total": layer.total,
                "method": layer.method,
                "common_share": layer.shared,
            }
            for layer in found.layers
        ],
        "skipped": [
            {"name": name, "reason": reason, "share": energy / found.total if found.total else 0.0}
            for reason, names in found.skipped.items()
            for name, energy in names.items()
        ],
    }
