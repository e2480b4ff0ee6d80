"""The ``mergetool`` program."""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated

import typer

from mergetool.cli import console
from mergetool.cli.lazily import group_of

HEADINGS = {
    "Look": ("inspect", "compare", "methods"),
    "Merge": ("merge", "convert"),
    "LoRA": ("diff", "lora"),
    "Check": ("verify", "sample", "demo"),
    "Set up": ("models", "doctor", "help", "version"),
}

app = typer.Typer(
    name="mergetool",
    cls=group_of(
        {
            "inspect": ("inspect:inspect", "Show what a model file holds."),
            "merge": ("merge:merge", "Merge models by an expression."),
            "diff": ("diff:diff", "Save the difference of two models as a LoRA."),
            "compare": ("compare:compare", "Measure how far one model is from another."),
            "methods": ("methods:methods", "List the merge methods, or explain one."),
            "convert": ("convert:convert", "Change a model's dtype, container or layout."),
            "sample": ("sample:sample", "Draw pictures with one model, or with two."),
            "verify": ("verify:verify", "Check a merge: its tensors and its pictures."),
            "replay": ("replay:replay", ""),
            "demo": ("demo:demo", "Run the whole story on small models."),
            "models": ("models:models", "Give models names, list or remove names."),
            "lora": ("lora:lora", "Inspect, add, shrink and convert LoRAs."),
            "doctor": ("doctor:doctor", "Check the installation, and how to mend it."),
            "help": ("words:show_help", "Show this page, or the help of a command."),
            "version": ("words:version", "Print the version, and the parts in use."),
        },
        HEADINGS,
    ),
    help="""Merge image models, and turn their differences into LoRAs, in half a GB of memory for 12 GB checkpoints. \
Z-Image, Flux.2, Chroma, Flux.1, SDXL, SD1.5, SD3, Lumina-Image 2, Wan and Qwen-Image by name; other architectures merge by their tensor names.

\b
Type first:
  mergetool inspect FILE    to see what a model is
  mergetool merge --help    for examples that you can copy
  mergetool demo            to see a merge made and checked
""",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="""Exit codes: 0 done, 1 a check said no, 2 wrong command line, 65 bad data, 66 input missing, 69 a package is missing, 70 a GPU failed, \
73 output cannot be written, 74 reading or writing failed, 75 output in use, 130 stopped.

Read on: "mergetool help COMMAND" has the options and examples of a command; the docs folder has tutorials and explanations.
""",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mergetool.cli.words import version

        version()
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
