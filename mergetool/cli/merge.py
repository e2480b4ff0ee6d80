"""``mergetool merge``: a combination of checkpoints, or the outputs of a recipe file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import typer

from mergetool.api.merges import Merge, run_merge
from mergetool.cli import console, merge_report
from mergetool.cli.parameters import Typed, command
from mergetool.errors import UsageError

EXAMPLES = """\b
Examples:
  mergetool merge "lab.alkahest + 1.5*(lab.striped - lab.base)" --protect refiner -o striped.safetensors
  mergetool merge "alkahest + 20 * (artshoot - 'z-image')" --protect refiner -o out.safetensors
  mergetool merge "alkahest + 171.1*(a - b) + 20*(c - d)" --set layers.0-5=0.5 --set v=0 -o out.safetensors
  mergetool merge "alkahest + 20*(a - b)" --set refiner=0 --set "layers=linear(0.2,1)" --set "layers.*.attention=2" --dry-run
  mergetool merge "0.5*'a.safetensors' + 0.5*'base.safetensors'" --layout diffusers --shard-size 5GB -o out-folder
  mergetool merge "alkahest + 0.3 * (tuned - base)" --dtype fp8_e4m3 --rounding stochastic --seed 1 -o out.safetensors
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --quant fp8-scaled -o out-fp8.safetensors
  mergetool merge "turbo + 0.7*lora('style.safetensors') - lora('detail.safetensors')" -o baked.safetensors
  mergetool merge bridge.yaml --var m=20 -o outputs --dry-run
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --resume -o out.safetensors

Models: lab.NAME comes with mergetool, `mergetool models add` registers other names, and paths and "hf://org/repo" work too. Put names in \
quotes if they have more than letters, digits, dots and _.

The anchor is the first model of the expression; the output takes from it all that the expression does not change. Multipliers may be any \
finite numbers. mergetool takes differences first, in float32, then multiplies them.

PATTERN is one of: a group that `mergetool inspect` lists (refiner, attention, ffn, q, layers.0-9 ...); a glob over names of tensors or \
modules ("layers.*.attention"); re:REGEX; or a group within a pattern (layers.q is the q weights of the main layers). MULT is a number, or \
SHAPE(FIRST,LAST) over the blocks of a stack, with SHAPE linear, smooth or bell (LAST in the middle). `mergetool inspect MODEL` lists groups \
and presets; docs has a page on groups.
"""

CONTEXT = {"allow_extra_args": True}  # to say what was meant by them


def _print_schema(wanted: bool) -> None:
    if wanted:
        from mergetool.recipe.schema import json_schema

        console.print_json(json_schema())
        raise typer.Exit


_OWN = [
    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
    for name, annotation, default in (
        ("context", typer.Context, inspect.Parameter.empty),
        (
            "variables",
            Annotated[
                list[str] | None,
                typer.Option("--var", help="Set a variable of the recipe file. Repeatable.", metavar="NAME=VALUE"),
            ],
            None,
        ),
        (
            "schema",
            Annotated[
                bool,
                typer.Option(
                    "--schema", callback=_print_schema, is_eager=True, help="Print the JSON schema of recipe files."
                ),
            ],
            False,
        ),
    )
]


@command(Merge, own=_OWN, own_section="Recipe files")
def merge(typed: Typed) -> None:
    """Merge models by an expression.

    mergetool reads and writes piece by piece, so memory stays small whatever the models' size.

    A recipe file holds models, expressions and options for one output or many; outputs that are up to date stay as they are.
    """
    expression, variables = typed.given["expression"], typed.own["variables"]
    if typed.own["context"].args:
        raise _several(expression, typed.own["context"].args)
    if expression.lower().endswith((".yaml", ".yml")):
        from mergetool.cli import merge_recipe

        merge_recipe.perform(Path(expression), variables or (), typed)
        return
    if variables:
        raise UsageError("--var sets a variable of a recipe file; in an expression, write the number itself.")
    with merge_report.MergeReport.shown(typed) as report:
        run_merge(typed.request(Merge), report)


def _several(first: str, more: Sequence[str]) -> UsageError:
    """The error for an expression in several arguments: one without quotes around it, or models without an operation."""
    from mergetool.recipe.expression import parse
    from mergetool.recipe.quotes import quote

    whole = " ".join([first, *more])
    try:
        parse(whole)
    except UsageError as error:
        names = [first, *more]
        if any(re.fullmatch(r"[-+*/()\d.,%]+", name) for name in names):
            return UsageError(f"the expression is one argument, in quotes; and {error}")
        mean = " + ".join(f"{Decimal(1) / len(names):.4g}*{quote(name)}" for name in names)
        return UsageError(
            f"the expression is one argument, in quotes, and there are {len(names)}: {', '.join(names)}; "
            f'write how to combine them: "{mean}" is their mean, "{quote(names[0])} + 0.5*({quote(names[-1])} - BASE)" adds what one learned.'
        )
    return UsageError(f'the expression is one argument, in quotes: write "{whole}".')
