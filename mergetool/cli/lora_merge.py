"""``mergetool lora merge``: several LoRAs added up to one."""

from __future__ import annotations

from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli import lora_combining as combining
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption
from mergetool.options.kinds import with_strengths
from mergetool.options.multipliers import parse_setting

EXAMPLES = """\b
Examples:
  mergetool lora merge style.safetensors:0.8 detail.safetensors:-0.3 -o both.safetensors
  mergetool lora merge style.safetensors detail.safetensors:0.5 -o both-32.safetensors --rank 32
  mergetool lora merge a.safetensors b.safetensors c.safetensors -o all.safetensors --budget 300MB
  mergetool lora merge style.safetensors:0.8 detail.safetensors --set refiner=0 --set ffn=0.5 -o partly.safetensors

Each LORA is a file or a PEFT folder of any spelling, then a colon and its strength (1 without; negative takes it away). Without a rank,
threshold or budget the sum is exact: the factors side by side, ranks added up, strengths multiplied into the up factors or into the
alpha, whichever rounds least; what had to be rounded is the residual. With one it is recompressed from the exact sum. PATTERNs of --set
are groups, globs or re:REGEX as everywhere.
"""


@console.command
def merge_loras(
    loras: Annotated[list[str], typer.Argument(help="LoRAs, each with its strength", metavar="LORA[:STRENGTH]...")],
    output: combining.OutputOption = None,
    rank: combining.RankOption = None,
    rank_thresh: combining.RankThreshOption = None,
    rank_max: combining.RankMaxOption = None,
    rule: combining.RuleOption = None,
    budget: combining.BudgetOption = None,
    multipliers: combining.SetOption = None,
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
    """Add LoRAs up to one, exactly or at a smaller rank."""
    settings = combining.Settings(
        "merge",
        output,
        combining.selection(rank, rank_thresh, rule, budget, rank_max, needed=False),
        dtype=combining.output_dtype(dtype),
        multipliers=tuple(parse_setting(text) for text in multipliers or ()),
        model=model,
        threads=threads,
        skip_unmatched=skip_unmatched,
        overwrite=overwrite,
        dry_run=dry_run,
        as_json=as_json,
        shows_progress=not (no_progress or as_json),
        verbose=verbose,
    )
    combining.perform(with_strengths(loras), settings)
