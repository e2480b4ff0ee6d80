"""``mergetool lora common``: what two LoRAs have in common."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli import lora_combining as combining
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption

EXAMPLES = """\b
Examples:
  mergetool lora common style.safetensors other.safetensors -o both-have.safetensors
  mergetool lora common a.safetensors b.safetensors -o shared.safetensors --rank-thresh 0.99

Modules that only one of them changes have nothing in common and are named. The rank is at most the smaller of the two ranks. Common
parts of checkpoints' differences are what `mergetool diff` takes.
"""


@console.command
def common(
    first: Annotated[str, typer.Argument(help="One LoRA", metavar="A")],
    second: Annotated[str, typer.Argument(help="Another", metavar="B")],
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
    """Take what two LoRAs have in common: the directions that both write to and both read, at the strength both have."""
    from mergetool.lora import operations

    settings = combining.Settings(
        "common",
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
    combining.perform(
        [(first, Fraction(1)), (second, Fraction(1))],
        settings,
        prepare=operations.both,
        derive=operations.common,
    )
