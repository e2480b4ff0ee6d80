"""``mergetool lora``."""

from __future__ import annotations

import typer

from mergetool.cli.lazily import group_of

lora = typer.Typer(
    cls=group_of(
        {
            "inspect": "lora_inspect:inspect",
            "bake": "lora_bake:bake",
            "resize": "lora_sums:resize",
            "merge": "lora_sums:merge",
            "subtract": "lora_subtract:subtract",
            "orthogonal": "lora_sums:orthogonal",
            "common": "lora_sums:common",
            "interference": "lora_interference:interference",
            "convert": "lora_convert:convert",
            "verify": "lora_verify:verify",
        }
    ),
    help="Look at LoRAs, add, shrink and convert them.\n\nAdd them to checkpoints and to each other, make them smaller, convert and verify them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
