"""``mergetool lora bake``: one or many LoRAs added to a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli import merge as merging
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
from mergetool.recipe.quoting import in_quotes, quote

EXAMPLES = """\b
Examples:
  mergetool lora bake z-image style.safetensors -o styled.safetensors
  mergetool lora bake turbo style.safetensors:0.8 detail.safetensors:-0.3 -o turbo-styled.safetensors
  mergetool lora bake turbo-fp8.safetensors style.safetensors:0.7 --quant fp8-scaled -o styled-fp8.safetensors
  mergetool lora bake turbo style.safetensors --set refiner=0 --set layers.20-29=0.5 -o partly.safetensors

LORA is a file or a PEFT folder in any spelling that `mergetool lora inspect` reads, then a colon and its strength (1 without;
negative takes it away). All are added in float32 in one pass, and rounded once. The same is
`mergetool merge "model + 0.8 * lora('style.safetensors')"`, where differences of models can be added too.
"""


@console.command
def bake(
    model: Annotated[str, typer.Argument(help="What to add to: a MODEL of any layout or container")],
    loras: Annotated[list[str], typer.Argument(help="LoRAs, each with its strength", metavar="LORA[:STRENGTH]...")],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="FILE.safetensors, or FOLDER/ for a folder. Needed unless --dry-run."),
    ] = None,
    multipliers: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Scale what is added to a group; 0 leaves it as it is. Repeatable; later wins.",
            metavar="GROUP=MULT",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave these as they are. Repeatable.", metavar="PATTERN")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="bf16, fp16, fp32, fp8_e4m3 or fp8_e5m2 [default: the model's]")
    ] = None,
    quant: QuantOption = None,
    scale_search: ScaleSearchOption = False,
    bundled: BundledOption = "keep",
    layout: Annotated[str | None, typer.Option(help="comfyui or diffusers [default: the model's]")] = None,
    rounding: Annotated[str, typer.Option(help="nearest, stochastic or error-feedback.")] = "nearest",
    seed: Annotated[int, typer.Option(help="Seed of --rounding stochastic.", min=0)] = 0,
    shard_size: Annotated[
        str | None, typer.Option(help="Write a folder of shards no larger than this, as in 5GB.", metavar="SIZE")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: all cores]", min=1, max=256)] = None,
    skip_unmatched: SkipUnmatchedOption = False,
    force: Annotated[bool, typer.Option("--force", help="Bake however far the result lands from the model.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done to every tensor.")] = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Add LoRAs to a checkpoint of any layout or container, streaming, in one pass."""
    from mergetool.checkpoint import dtypes
    from mergetool.ops.rounding import MODES
    from mergetool.recipe.options import Options

    options = Options(
        exclude=tuple(exclude or ()),
        multipliers=tuple(merging.multiplier(text) for text in multipliers or ()),
        dtype=dtypes.output_dtype(dtype),
        layout=layout,
        rounding=console.choice("--rounding", rounding, MODES),
        seed=seed,
        quant=quant,
        scale_search=scale_search,
        bundled=bundled,
    )
    settings = merging.Settings(
        shard_size=console.parse_size(shard_size) if shard_size else None,
        threads=threads,
        skip_unmatched=skip_unmatched,
        force=force,
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
        shows_progress=not (no_progress or as_json),
        verbose=verbose,
    )
    merging.perform(expression(model, loras), options, output, settings, bar="bake")


def expression(model: str, loras: list[str]) -> str:
    """The merge that adds ``loras``, each PATH[:STRENGTH], to ``model``. Raises UsageError for a strength that is no number."""
    terms = [quote(model)]
    for path, strength in with_strengths(loras):
        terms.append(f"{'-' if strength < 0 else '+'} {abs(strength)} * lora({in_quotes(path)})")
    return " ".join(terms)


_AMOUNT = r"[+-]?\d+(?:[.,]\d+)?\s*%?"


def with_strengths(texts: Sequence[str]) -> list[tuple[str, Fraction]]:
    """`with_strength` of each. Raises UsageError, with what to write, for a strength beside its LoRA, with a comma or in per cent."""
    for i, text in enumerate(texts):
        path, _, amount = text.rpartition(":")
        if not re.fullmatch(_AMOUNT, amount) or Path(text).exists():
            continue
        if not path and i:
            raise UsageError(f'a strength follows its LoRA after a colon: write "{texts[i - 1]}:{_decimal(amount)}".')
        if path and amount != _decimal(amount) and not amount.startswith("+"):
            raise UsageError(f'"{text}": a strength is a number with a point: write "{path}:{_decimal(amount)}".')
    return [with_strength(text) for text in texts]


def _decimal(amount: str) -> str:
    """A number as people write it, with a point and without a per cent sign."""
    digits = amount.replace(",", ".").rstrip("% ")
    return str(Decimal(digits) / 100) if "%" in amount else digits


def with_strength(text: str) -> tuple[str, Fraction]:
    """The path and the strength of ``LORA[:STRENGTH]``; a colon is part of the path unless a number follows.

    Example: ``style.safetensors:-0.3`` gives ``("style.safetensors", Fraction(-3, 10))``. Raises UsageError for a strength that is
    not finite.
    """
    path, colon, number = text.rpartition(":")
    try:
        value = float(number) if colon and path else None
    except ValueError:
        value = None
    if value is None:
        return text, Fraction(1)
    if not math.isfinite(value) or len(number) > 40:
        raise UsageError(f'"{text}": the strength {number[:40]} is not a finite number.')
    # Not Fraction("1e-999999999"), which is zero to every program and a number of a billion digits here.
    return path, Fraction(number.strip()) if value else Fraction(0)
