"""``mergetool lora``."""

from __future__ import annotations

import typer

from mergetool.cli.lazily import group_of

lora = typer.Typer(
    cls=group_of(
        {
            "inspect": ("lora_inspect:inspect", "Show what a LoRA holds, and who loads it."),
            "bake": ("lora_bake:bake", "Add LoRAs to a checkpoint, streaming."),
            "resize": ("lora_sums:resize", "Make a LoRA smaller: to a rank, share or size."),
            "merge": ("lora_sums:merge", "Add LoRAs up to one, exactly or at a smaller rank."),
            "subtract": ("lora_subtract:subtract", ""),
            "orthogonal": ("lora_sums:orthogonal", "Take the part of A that is orthogonal to B."),
            "common": ("lora_sums:common", "Keep the part that two LoRAs share."),
            "interference": ("lora_interference:interference", "Score how much LoRAs act on the same thing."),
            "convert": ("lora_convert:convert", "Write a LoRA under another program's names."),
            "verify": ("lora_verify:verify", "Check that base + LoRA makes the tuned model."),
        }
    ),
    help="Look at LoRAs, add, shrink and convert them.\n\nAdd them to checkpoints and to each other, make them smaller, convert and verify them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
