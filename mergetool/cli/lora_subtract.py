"""``mergetool lora subtract``: one LoRA minus another."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli import lora_combining as combining
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption

EXAMPLES = """\b
Examples:
  mergetool lora subtract both.safetensors style.safetensors -o rest.safetensors
  mergetool lora subtract epoch20.safetensors epoch10.safetensors -o later.safetensors --rank 16

The same as `mergetool lora merge A B:-1`, where strengths can be given. The difference of two checkpoints is `mergetool diff`.
"""


@console.command
def subtract(
    first: Annotated[str, typer.Argument(help="The LoRA to subtract from", metavar="A")],
    second: Annotated[str, typer.Argument(help="The LoRA to take away", metavar="B")],
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
    """Take one LoRA away from another: A - B, exactly or at a smaller rank."""
    settings = combining.Settings(
        "subtract",
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
    combining.perform([(first, Fraction(1)), (second, Fraction(-1))], settings)
