"""``mergetool lora orthogonal``: the part of one LoRA that is orthogonal to another."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli import lora_combining as combining
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption

EXAMPLES = """\b
Examples:
  mergetool lora orthogonal style.safetensors detail.safetensors -o style-only.safetensors
  mergetool lora orthogonal style.safetensors detail.safetensors -o style-only-16.safetensors --rank 16

In every module A - c * B, with c = <A, B> / <B, B>, the sums of products of all elements: nothing of the result points along B. Modules
that only A changes stay as they are; without a rank the factors are put side by side as `lora merge` does.
"""


@console.command
def orthogonal(
    first: Annotated[str, typer.Argument(help="The LoRA to take the part of", metavar="A")],
    second: Annotated[str, typer.Argument(help="The LoRA to be orthogonal to", metavar="B")],
    output: combining.OutputOption = None,
    rank: combining.RankOption = None,
    rank_thresh: combining.RankThreshOption = None,
    rank_max: combining.RankMaxOption = None,
    rule: combining.RuleOption = None,
    budget: combining.BudgetOption = None,
    dtype: combining.DtypeOption = None,
    model: combining.ModelOption = None,
    threads: combining.ThreadsOption = None,
    skip_unmatched: combining.SkipOption = False,
    overwrite: combining.OverwriteOption = False,
    dry_run: combining.DryRunOption = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Take the part of A that is orthogonal to B: A without its component along B, in every module by itself."""
    from mergetool.lora import operations

    settings = combining.Settings(
        "orthogonal",
        output,
        combining.selection(rank, rank_thresh, rule, budget, rank_max, needed=False),
        dtype=combining.output_dtype(dtype),
        model=model,
        threads=threads,
        skip_unmatched=skip_unmatched,
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
        shows_progress=not (no_progress or as_json),
        verbose=verbose,
    )
    combining.perform([(first, Fraction(1)), (second, Fraction(1))], settings, prepare=operations.orthogonal)
