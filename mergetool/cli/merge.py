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
  mergetool merge "alk + 171.1*(a - b) + 20*(c - d)" --set layers.0-9=0.5 --set v=0 -o out.safetensors
  mergetool merge "alk + 20*(a - b)" --set refiner=0 --set "layers=linear(0.2,1)" --set "layers.*.attention=2" --dry-run
  mergetool merge "0.5*'a.safetensors' + 0.5*'b.safetensors'" --layout diffusers --shard-size 5GB -o out-folder
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --protect refiner --dry-run
  mergetool merge "alkahest + 0.3 * (tuned - base)" --dtype fp8_e4m3 --rounding stochastic --seed 1 -o out.safetensors
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --quant fp8-scaled -o out-fp8.safetensors
  mergetool merge "turbo + 0.7*lora('a.safetensors') - lora('b.safetensors')" -o baked.safetensors
  mergetool merge bridge.yaml --var m=20 -o outputs --dry-run
  mergetool merge "alkahest + 20 * (turbo - deturbo)" --resume -o out.safetensors

lab.NAME are models that come with mergetool. Others are registered with `mergetool models add`; quoted paths and "hf://org/repo" work too. Quote what is more than
letters, digits, dots and _. Any finite multiplier is allowed; differences are taken first, in float32, then scaled.
PATTERN is a group that `mergetool inspect` lists (refiner, attention, ffn, q, layers.0-9 ...), a glob over tensor
or module names ("layers.*.attention"), re:REGEX, or what of a group is in one of those (layers.q, layers.0-9.ffn). SHAPE(FIRST,LAST) over the
blocks of one stack: linear, smooth, bell (LAST in the middle). `mergetool inspect MODEL` lists groups and presets.
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
                typer.Option("--var", help="Set a variable of a recipe. Repeatable.", metavar="NAME=VALUE"),
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


@command(Merge, own=_OWN)
def merge(typed: Typed) -> None:
    """Merge checkpoints by an expression, streaming.

    Memory stays small whatever their size.

    A recipe file (docs/reference/recipes.md) holds models, expressions and options of one output or many; what is up to date is not made again.
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
    """The error for an expression that is several arguments: one without quotes around it, or models without what to do with them."""
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
            f'say what to do with them: "{mean}" is their mean, "{quote(names[0])} + 0.5*({quote(names[-1])} - BASE)" adds what one has learned.'
        )
    return UsageError(f'the expression is one argument, in quotes: write "{whole}".')
