"""``mergetool lora``."""

from __future__ import annotations

import typer

from mergetool.cli.lazily import group_of

lora = typer.Typer(
    cls=group_of(
        {
            "inspect": "lora_inspect:inspect",
            "bake": "lora_bake:bake",
            "resize": "lora_resize:resize",
            "merge": "lora_merge:merge_loras",
            "subtract": "lora_subtract:subtract",
            "orthogonal": "lora_orthogonal:orthogonal",
            "common": "lora_common:common",
            "interference": "lora_interference:interference",
            "convert": "lora_convert:convert",
            "verify": "lora_verify:verify",
        }
    ),
    help="Look at LoRAs, add them to checkpoints and to each other, make them smaller, convert and verify them.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
