"""The ``mergetool`` program."""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated

import typer

from mergetool import __version__
from mergetool.cli import console
from mergetool.cli.lazily import group_of

app = typer.Typer(
    name="mergetool",
    cls=group_of(
        {
            "inspect": ("inspect:inspect", "Show what a model file holds."),
            "merge": ("merge:merge", "Merge checkpoints by an expression, streaming."),
            "diff": ("diff:diff", "Take the difference of two models as a LoRA."),
            "compare": ("compare:compare", "Measure how far B lies from A, block by block."),
            "methods": ("methods:methods", "List the merge methods, or show one."),
            "convert": ("convert:convert", "Write a model in another dtype, form or layout."),
            "sample": ("sample:sample", "Make pictures with one model, or with two."),
            "verify": ("verify:verify", "Check the tensors and the pictures of a merge."),
            "replay": ("replay:replay", ""),
            "demo": ("demo:demo", "Try all of it on the embedded models."),
            "models": ("models:models", "Name models, list names, forget them."),
            "lora": ("lora:lora", "Look at LoRAs, add, shrink and convert them."),
            "help": ("words:show_help", "Show the help of mergetool or of a command."),
            "version": ("words:version", "Print the version."),
        }
    ),
    help="Merge diffusion-transformer checkpoints and take difference LoRAs, streaming: 12 GB models in half a GB of "
    "memory. Z-Image, Flux.1 and SDXL by name; other architectures merge by their tensor names.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 a check said no, 2 usage, 65 bad data, 66 input missing, 73 output cannot be made, "
    "74 I/O error, 75 busy, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mergetool {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a console that lacks a character still gets the line
    # Libraries make a million objects that live as long as the program: looking through them for garbage again and again, and a last
    # time at the end, is 0.4 of the 1.4 s that a command with torch takes to start and to end.
    gc.set_threshold(10_000, 10, 50)
    try:
        console.run(app)
    finally:
        gc.freeze()
