"""``mergetool lora interference``: how much LoRAs get in each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console
from mergetool.cli import lora_combining as combining
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption
from mergetool.cli.diff_ranks import GROUPS
from mergetool.errors import UsageError

if TYPE_CHECKING:
    from mergetool.lora.operations import Score

EXAMPLES = """\b
Examples:
  mergetool lora interference style.safetensors detail.safetensors
  mergetool lora interference a.safetensors b.safetensors c.safetensors --json
  mergetool lora interference style.safetensors detail.safetensors --signs -v
  mergetool lora interference tuned-a.safetensors tuned-b.safetensors --base z-image

cosine is 1 where both do the same, -1 where they cancel, 0 where neither helps or hinders the other. outputs is the share of A's
energy that writes to directions B writes to as well, inputs the share that reads what B reads, both the share that does both;
unrelated LoRAs have about rank / width. --signs adds the share of elements' products whose signs are opposite (0.5 for unrelated ones),
for which every element is looked at.
"""


@console.command
def interference(
    loras: Annotated[list[str], typer.Argument(help="Two or more, every pair of which is scored", metavar="A B...")],
    base: Annotated[
        str | None,
        typer.Option(help="The model that A and B are differences to; they may be checkpoints then.", metavar="MODEL"),
    ] = None,
    signs: Annotated[bool, typer.Option("--signs", help="Also how many elements pull in opposite directions.")] = False,
    threads: combining.ThreadsOption = None,
    skip_unmatched: combining.SkipOption = False,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Score how much LoRAs, or models' differences to a base, act on the same thing, by group and overall."""
    if len(loras) < 2:
        raise UsageError("give at least two LoRAs to compare.")
    shows = not (no_progress or as_json)
    pairs: list[dict[str, Any]] = []
    for first, second in combinations(loras, 2):
        if base is None:
            found, left_out, warnings = _of_loras(first, second, signs, threads, skip_unmatched, shows)
        else:
            found, left_out, warnings = _of_deltas(base, first, second, signs, threads, skip_unmatched, shows)
        groups, overall = _summary(found)
        if as_json:
            pairs.append(
                {
                    "first": first,
                    "second": second,
                    "overall": _json(overall),
                    "groups": [_json(one) for one in groups],
                    "modules": [_json(one) for one in found],
                    "left_out": [{"name": name, "reason": reason} for name, reason in left_out],
                }
            )
            continue
        shared = sum(all(one.energies) for one in found)
        console.heading("pair", f"A = {first}, B = {second}: {len(found)} modules, {shared} of them in both")
        for warning in warnings:
            console.heading("note", warning)
        names = [name for name, _ in left_out]
        if names:
            console.heading("", f"{len(names)} left out, no matrices of a module: {console.listed(names, most=2)}")
        _table([*(found if verbose else []), *groups, overall], signs=signs)
    if as_json:
        console.print_json({"pairs": pairs})


Found = tuple[list["Score"], list[tuple[str, str]], list[str]]
"""Scores, what is left out with the reason, and warnings."""


def _of_loras(first: str, second: str, signs: bool, threads: int | None, skip: bool, shows: bool) -> Found:
    from mergetool.lora.gathering import gather, opened
    from mergetool.lora.operations import scores

    with opened([(first, Fraction(1)), (second, Fraction(1))]) as terms:
        gathering = gather(terms, skip_unmatched=skip)
        with console.progress("score", len(gathering.modules), shown=shows, unit=" modules") as bar:
            found = list(scores(gathering, signs=signs, threads=threads, progress=bar))
        left_out = [(name, reason) for name, reason, _ in gathering.left_out]
        return found, left_out, list(combining.warnings(gathering))


def _of_deltas(base: str, first: str, second: str, signs: bool, threads: int | None, skip: bool, shows: bool) -> Found:
    from mergetool.lora.extract import open_diff
    from mergetool.lora.operations import delta_scores
    from mergetool.options.differences import DiffOptions

    options = DiffOptions(variant2=second, orthogonal=True, min_dim=1)  # what only one of them changes is scored too
    with open_diff(base, first, options, skip_unmatched=skip) as pairing:
        size = sum(map(pairing.nbytes, pairing.decomposed))
        with console.progress("score", size, shown=shows) as bar:
            found = list(delta_scores(pairing, signs=signs, threads=threads, progress=bar))
        skipped = [(pair.name, pair.reason) for pair in pairing.pairs if pair.reason]
        return found, [*skipped, *pairing.left_out], []


def _summary(found: list[Score]) -> tuple[list[Score], Score]:
    """The scores of every group that has matrices, and of all."""
    from mergetool.lora.operations import summed

    groups = [
        summed(chosen, group)
        for group in (*GROUPS, "other")
        if (chosen := [one for one in found if combining.in_group(one.groups) == group])
    ]
    return groups, summed(found, "overall")


def _table(found: Sequence[Score], *, signs: bool) -> None:
    header = ["", "norm A", "norm B", "cosine", "outputs", "inputs", "both", *(["opposing"] if signs else [])]
    rows = [
        [
            one.name,
            *(f"{energy**0.5:.4g}" for energy in one.energies),
            f"{one.cosine:+.4f}",
            *(f"{100 * share:.1f} %" for share in (one.column_share, one.row_share, one.both_share)),
            *([f"{one.opposing:.3f}" if one.opposing is not None else ""] if signs else []),
        ]
        for one in found
    ]
    console.table(header, rows)


def _json(one: Score) -> dict[str, Any]:
    return {
        "name": one.name,
        "norms": [energy**0.5 for energy in one.energies],
        "cosine": one.cosine,
        "column_share": one.column_share,
        "row_share": one.row_share,
        "both_share": one.both_share,
        "opposing": one.opposing,
    }
