"""``mergetool diff``: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console, diff_outputs
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption

if TYPE_CHECKING:
    from mergetool.lora.extract import Extraction
    from mergetool.lora.layer import Layer
    from mergetool.lora.pairs import DiffOptions, Pair, Pairing

# The first of these that a matrix is in is its row of the table.
GROUPS = ("attention", "ffn", "adaln", "embedder", "final")

EXAMPLES = """\b
Examples:
  mergetool diff --base alkahest --variant turbo --rank-thresh 0.995 --exclude refiner
  mergetool diff --base base.safetensors --variant tuned.safetensors --rank 32 -o tuned.lora.safetensors
  mergetool diff --base z-image --variant ./tuned-folder --include attention --include ffn --rank-max 128
  mergetool diff --base alkahest --variant turbo --budget 300MB --spectra turbo.spectra.safetensors
  mergetool diff --base alkahest --variant turbo --rule ratio --rank-thresh 0.05 --rank-max 0

  mergetool diff --base z-image --variant a.safetensors --variant2 b-lora.safetensors -o common.safetensors
  mergetool diff --base z-image --variant a.safetensors --variant2 b.safetensors --union --weights 1,0.5 -o both.safetensors
  mergetool diff --base z-image --variant tuned --full tuned-full.safetensors --full-layer embedder --checkpoint check.safetensors

A variant may be a LoRA, or a PEFT folder, in any spelling: its change to --base is then the difference. What two differences have in
common, and their union, is defined in docs/lora-sets.md.

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
    output: Annotated[
        Path | None,
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
        Path | None,
        typer.Option(
            help="FILE.safetensors to keep what was found in: the next run, at another threshold, rank or budget, need not search."
        ),
    ] = None,
    min_dim: Annotated[int, typer.Option(help="Leave out matrices with fewer rows or columns.")] = 32,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave these out. Repeatable.", metavar="PATTERN")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Take only these. Repeatable.", metavar="PATTERN")] = None,
    dtype: Annotated[str, typer.Option(help="What the factors are stored in: bf16, fp16 or fp32.")] = "bf16",
    full: Annotated[
        Path | None,
        typer.Option(
            help="FILE.safetensors for ComfyUI: biases, norms and what has no factors, stored whole. Load it beside the LoRA."
        ),
    ] = None,
    full_layer: Annotated[
        list[str] | None,
        typer.Option(help="Store these matrices whole, in --full. Repeatable.", metavar="PATTERN"),
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="FILE.safetensors to write the base with what was stored added to.")
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
    """Take the difference variant - base as a LoRA that ComfyUI and diffusers both load whole.

    A rank is chosen for every matrix by a certificate: the kept singular values hold at least --rank-thresh of the
    energy of its whole spectrum, unless --rank-max stops it first, which is said. With --budget the ranks are those that
    leave the least error of all matrices together in a file of that size.
    """
    from mergetool.lora import on_device
    from mergetool.lora.extract import extract, on_the_cpu, open_diff

    options = replace(
        _options(rank, rank_thresh, rank_max, rule, budget, min_dim, include, exclude, dtype, seed),
        full=full is not None,
        full_layers=tuple(full_layer or ()),
        union=union,
        weights=diff_outputs.weights(weights),
    )
    method = console.choice("--reader", reader, ("auto", "mmap", "pread"))
    target_device = on_device.choose(console.choice("--device", device, ("auto", "cpu", "cuda")))
    memory = console.parse_size(gpu_memory) if gpu_memory else 0
    started = time.monotonic()
    with open_diff(base, variant, options, second=variant2, skip_unmatched=skip_unmatched) as pairing:
        target = output or _default_output(base, variant)
        if not as_json:
            _print_pairing(pairing, verbose=verbose or dry_run)
            diff_outputs.print_operands(pairing, options)
        if dry_run:
            if as_json:
                console.print_json(_pairing_json(pairing))
            return
        if checkpoint is not None:
            diff_outputs.check_checkpoint(checkpoint, (target, full, spectra), pairing, overwrite=overwrite)
        only = on_the_cpu(options, spectra, pairing) if target_device else ""
        if only and not as_json:
            console.heading("note", f"{only} works on the CPU; the device is not used")
        with console.progress("diff", _bytes_read(pairing, options), shown=not (no_progress or as_json)) as bar:
            found = extract(
                pairing,
                target,
                options,
                full=full,
                overwrite=overwrite,
                threads=threads,
                method=method,
                device=target_device,
                memory=memory,
                spectra=spectra,
                progress=bar,
            )
        if checkpoint is not None:
            stored = [target, full] if full is not None and found.whole else [target]
            shown = not (no_progress or as_json)
            diff_outputs.bake(base, stored, checkpoint, overwrite=overwrite, threads=threads, shown=shown)
        seconds = time.monotonic() - started
        if as_json:
            note = {"note": f"{only} works on the CPU; the device is not used"} if only else {}
            console.print_json(
                _pairing_json(pairing)
                | note
                | _extraction_json(found, options, spectra, target, seconds)
                | diff_outputs.whole_json(found, full, checkpoint, pairing)
            )
        else:
            _print_extraction(
                found, options, pairing, target, seconds, full=full, checkpoint=checkpoint, verbose=verbose
            )
            if spectra is not None:
                _print_spectra(found, spectra)


def _options(
    rank: int,
    rank_thresh: float | None,
    rank_max: int | None,
    rule: str,
    budget: str | None,
    min_dim: int,
    include: Sequence[str] | None,
    exclude: Sequence[str] | None,
    dtype: str,
    seed: int,
) -> DiffOptions:
    from mergetool.checkpoint.dtypes import output_dtype
    from mergetool.errors import UsageError
    from mergetool.lora.pairs import DiffOptions
    from mergetool.lora.rules import RULES

    console.choice("--dtype", dtype, ("bf16", "fp16", "fp32"))
    console.choice("--rule", rule, RULES)
    if rank_thresh is not None and (rule == "knee" or budget):
        raise UsageError(f"{'--budget' if budget else '--rule knee'} has no threshold; leave out --rank-thresh.")
    if rank_thresh is None and rule in ("ratio", "abs") and not rank:
        raise UsageError(f"--rule {rule} needs --rank-thresh; `mergetool diff --help` says what it is.")
    return DiffOptions(
        rank=rank,
        rank_thresh=0.95 if rank_thresh is None else rank_thresh,
        rank_max=(0 if budget else 64) if rank_max is None else rank_max,
        rule=rule,  # type: ignore[arg-type]
        budget=console.parse_size(budget) if budget else 0,
        min_dim=min_dim,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        dtype=output_dtype(dtype),
        seed=seed,
    )


def _bytes_read(pairing: Pairing, options: DiffOptions) -> int:
    """What the progress bar runs to: a budget reads the matrices once to find directions and once to use them."""
    again = sum(map(pairing.nbytes, pairing.decomposed)) if options.budget else 0
    return pairing.bytes_read + again


def _default_output(base: str, variant: str) -> Path:
    from mergetool.recipe.provenance import display_names

    names = display_names([base, variant])
    return Path(f"{names[variant]}-minus-{names[base]}.safetensors")


def _print_pairing(pairing: Pairing, *, verbose: bool) -> None:
    from mergetool.lora.pairs import UNCHANGED

    reasons: dict[str, list[str]] = {}
    for pair in pairing.pairs:
        reasons.setdefault(_action(pair), []).append(pair.name)
    for name, reason in pairing.left_out:
        reasons.setdefault(reason, []).append(name)
    family = pairing.base.anatomy.family.name
    counts = " · ".join(f"{len(names)} {reason}" for reason, names in reasons.items())
    console.heading("pairs", f"{family}, {len(pairing.pairs) + len(pairing.left_out)} parameters · {counts}")
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


def _print_extraction(
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
    rows = [_row(name, layers, options) for name, layers in _by_group(found.layers).items()]
    if options.budget:
        console.heading("budget", _budget_line(found, options, target))
    console.heading("ranks", "")
    console.table(["group", "matrices", "rank min/med/max", "energy", "residual", "capped"], rows)
    _print_capped(found.layers, options)
    _print_unmet(found.layers, options, verbose=verbose)
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
    console.heading(
        "done", f"{target}  {console.size(target.stat().st_size)}  {seconds:.1f} s   loads in ComfyUI and diffusers"
    )
    diff_outputs.print_whole(found, full, verbose=verbose)
    base = pairing.base.name
    if checkpoint is not None:
        console.heading("", f"{checkpoint}  {console.size(checkpoint.stat().st_size)}  {base} with it added")
    console.heading("next", f"load it at strength 1 on {base}; at other strengths it moves part of the way, or past")


def _print_capped(layers: Sequence[Layer], options: DiffOptions) -> None:
    capped = [layer for layer in layers if layer.capped]
    if not capped:
        return
    wanted = [layer.wanted for layer in capped if layer.wanted is not None]
    worst = min(capped, key=lambda layer: layer.energy)
    if options.budget:
        console.heading("", f"{len(capped)} capped at {options.rank_max}: --rank-max 0 leaves it to the budget")
        return
    advice = (
        f"--rank-max {max(wanted)} would reach {options.rank_thresh:g}"
        if len(wanted) == len(capped)
        else f"--rank-max 0 would reach {options.rank_thresh:g}"
    )
    if options.share is None:
        advice = f"--rank-max 0 keeps all that --rule {options.rule} does"
    console.heading(
        "", f"{len(capped)} capped at {options.rank_max}, down to {worst.energy:.4f} ({worst.name}): {advice}"
    )


def _budget_line(found: Extraction, options: DiffOptions, target: Path) -> str:
    size = target.stat().st_size
    residual = (
        sum(one.residual**2 * one.total for one in found.layers) / sum(one.total for one in found.layers)
    ) ** 0.5
    return f"{size:,} of {options.budget:,} bytes · residual {100 * residual:.1f} % of all matrices together, the least at that size"


def _print_unmet(layers: Sequence[Layer], options: DiffOptions, *, verbose: bool) -> None:
    """What has no directions at all, and what its dtype keeps from the threshold."""
    nothing = [layer.name for layer in layers if layer.rank == 0]
    if nothing:
        total = sum(layer.total for layer in layers)
        share = 100 * sum(layer.total for layer in layers if layer.rank == 0) / total
        shown = console.listed(nothing, most=len(nothing) if verbose else 2)
        console.heading("", f"{len(nothing)} got rank 0, {share:.2g} % of the matrices' difference: {shown}")
    missed = [layer for layer in layers if layer.missed]
    if missed:
        worst = min(missed, key=lambda layer: 1 - layer.residual**2)
        console.heading(
            "",
            f"{len(missed)} below the threshold as stored, down to {1 - worst.residual**2:.7f} ({worst.name}): "
            f"{options.dtype.name.lower()} rounds away more than it leaves; --dtype fp32 would reach it",
        )


def _print_spectra(found: Extraction, spectra: Path) -> None:
    known = len(found.layers) - len(found.searched)
    searched = f"{console.plural(len(found.searched), 'matrix')} searched and added"
    console.heading("spectra", f"{spectra}  {console.size(spectra.stat().st_size)}  {known} known · {searched}")


def _by_group(layers: Sequence[Layer]) -> dict[str, list[Layer]]:
    rows: dict[str, list[Layer]] = {}
    for group in (*GROUPS, "other"):
        chosen = [layer for layer in layers if group == next((g for g in GROUPS if g in layer.groups), "other")]
        if chosen:
            rows[group] = chosen
    return rows


def _row(name: str, layers: Sequence[Layer], options: DiffOptions) -> list[str]:
    ranks = sorted(layer.rank for layer in layers)
    total = sum(layer.total for layer in layers)
    energy = sum(layer.energy * layer.total for layer in layers) / total
    residual = (sum(layer.residual**2 * layer.total for layer in layers) / total) ** 0.5
    capped = sum(layer.capped for layer in layers)
    return [
        name,
        str(len(layers)),
        f"{ranks[0]} / {ranks[len(ranks) // 2]} / {ranks[-1]}",
        f"{energy:.4f}",
        f"{100 * residual:.1f} %",
        f"{capped} at {options.rank_max}" if capped else "",
    ]


def _pairing_json(pairing: Pairing) -> dict[str, Any]:
    return {
        "base": pairing.base.name,
        "variant": pairing.variant.name,
        "family": pairing.base.anatomy.family.name,
        "bytes_read": pairing.bytes_read,
        "pairs": [{"name": pair.name, "action": _action(pair)} for pair in pairing.pairs],
        "left_out": [{"name": name, "reason": reason} for name, reason in pairing.left_out],
    }


def _extraction_json(
    found: Extraction, options: DiffOptions, spectra: Path | None, target: Path, seconds: float
) -> dict[str, Any]:
    return {
        "output": str(target),
        "ranks": {
            "rank": options.rank,
            "budget": options.budget,
            "rule": None if options.rank or options.budget else options.rule,
            "rank_thresh": None if options.rank or options.budget or options.rule == "knee" else options.rank_thresh,
            "rank_max": options.rank_max,
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
