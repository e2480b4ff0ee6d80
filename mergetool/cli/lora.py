"""``mergetool lora``."""

from __future__ import annotations

import typer

from mergetool.cli.lazily import group_of

lora = typer.Typer(
    cls=group_of(
        {
            "inspect": ("lora_inspect:inspect", "Show what a LoRA holds, and who loads it."),
            "bake": ("lora_bake:bake", "Add LoRAs to a model."),
            "resize": ("lora_sums:resize", "Make a LoRA smaller, to a rank, share or size."),
            "merge": ("lora_sums:merge", "Add LoRAs into one, exactly or at a lower rank."),
            "subtract": ("lora_subtract:subtract", ""),
            "orthogonal": ("lora_sums:orthogonal", "Keep the part of A that is orthogonal to B."),
            "common": ("lora_sums:common", "Keep the change that two LoRAs have in common."),
            "interference": ("lora_interference:interference", "Score how much LoRAs act on the same weights."),
            "convert": ("lora_convert:convert", "Write a LoRA under another program's names."),
            "verify": ("lora_verify:verify", "Check that base + LoRA gives the tuned model."),
        }
    ),
    help="Inspect, add, shrink and convert LoRAs.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
