"""``mergetool lora resize``: a LoRA at a smaller rank."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli import lora_combining as combining
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption

EXAMPLES = """\b
Examples:
  mergetool lora resize style.safetensors -o style-16.safetensors --rank 16
  mergetool lora resize style.safetensors -o style-small.safetensors --rank-thresh 0.99
  mergetool lora resize style.safetensors -o style-cut.safetensors --rule ratio --rank-thresh 0.1
  mergetool lora resize lokr.safetensors -o as-lora.safetensors --budget 150MB

LORA is a file or a PEFT folder of any spelling; LoHa, LoKr and whole differences become LoRAs. --rank-thresh keeps the fewest
singular values that hold that share of a module's energy (--rule energy); --budget shares a file's size out over all modules, so
that the total error is least. What is cut is the weakest part of every module, exactly; a module that needs no cut keeps its factors
bit for bit.
"""


@console.command
def resize(
    lora: Annotated[str, typer.Argument(help="The LoRA, of any spelling", metavar="LORA")],
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
    """Make a LoRA smaller: to a rank, to a share of its energy, or to a file's size."""
    settings = combining.Settings(
        "resize",
        output,
        combining.selection(rank, rank_thresh, rule, budget, rank_max, needed=not dry_run),
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
    combining.perform([(lora, Fraction(1))], settings)
