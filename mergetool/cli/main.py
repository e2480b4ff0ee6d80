"""The ``mergetool`` program."""

from __future__ import annotations

import gc
import io
import sys
from typing import Annotated

import typer

from mergetool import __version__
from mergetool.cli import (
    compare,
    console,
    convert,
    demo,
    diff,
    inspect,
    lora_bake,
    lora_common,
    lora_convert,
    lora_inspect,
    lora_interference,
    lora_merge,
    lora_orthogonal,
    lora_resize,
    lora_subtract,
    lora_verify,
    merge,
    methods,
    replay,
    sample,
    verify,
)
from mergetool.cli.models import models

app = typer.Typer(
    name="mergetool",
    help="Merge diffusion-transformer checkpoints and take difference LoRAs, streaming: 12 GB models in half a GB of "
    "memory. Z-Image first; other architectures merge by their tensor names.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 done, 1 a check said no, 2 usage, 65 bad data, 66 input missing, 73 output cannot be made, "
    "74 I/O error, 75 busy, 130 interrupted.",
)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=merge.EXAMPLES)(merge.merge)
app.command(epilog=diff.EXAMPLES)(diff.diff)
app.command(epilog=compare.EXAMPLES)(compare.compare)
app.command(epilog=methods.EXAMPLES)(methods.methods)
app.command(epilog=convert.EXAMPLES)(convert.convert)
app.command(epilog=sample.EXAMPLES)(sample.sample)
app.command(epilog=verify.EXAMPLES)(verify.verify)
app.command(epilog=replay.EXAMPLES)(replay.replay)
app.command(epilog=demo.EXAMPLES)(demo.demo)
app.add_typer(models, name="models")
lora = typer.Typer(
    help="Look at LoRAs, add them to checkpoints and to each other, make them smaller, convert and verify them.",
    no_args_is_help=True,
)
lora.command(epilog=lora_inspect.EXAMPLES)(lora_inspect.inspect)
lora.command(epilog=lora_bake.EXAMPLES)(lora_bake.bake)
lora.command(epilog=lora_resize.EXAMPLES)(lora_resize.resize)
lora.command("merge", epilog=lora_merge.EXAMPLES)(lora_merge.merge_loras)
lora.command(epilog=lora_subtract.EXAMPLES)(lora_subtract.subtract)
lora.command(epilog=lora_orthogonal.EXAMPLES)(lora_orthogonal.orthogonal)
lora.command(epilog=lora_common.EXAMPLES)(lora_common.common)
lora.command(epilog=lora_interference.EXAMPLES)(lora_interference.interference)
lora.command(epilog=lora_convert.EXAMPLES)(lora_convert.convert)
lora.command(epilog=lora_verify.EXAMPLES)(lora_verify.verify)
app.add_typer(lora, name="lora")


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
