"""``mergetool lora verify``: does base + LoRA make the tuned model?"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergetool.cli import console, loads
from mergetool.cli.console import JsonOption, NoProgressOption, VerboseOption
from mergetool.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from mergetool.lora.verify import LoraReport, Residual

EXAMPLES = """\b
Examples:
  mergetool lora verify z-image tuned-minus-z-image.safetensors tuned.safetensors
  mergetool lora verify base.safetensors lora.safetensors tuned.safetensors --max-residual 0.1
  mergetool lora verify base.safetensors lora.safetensors tuned.safetensors --strength 0.8 --json

A residual is what the LoRA leaves of the difference tuned - base, as a share of its Frobenius norm: before rounding (the factors alone) and
after (baked into the base's dtype). Exit code 1 when the overall residual after rounding is above --max-residual.
"""

GROUPS = ("attention", "ffn", "adaln", "norm", "embedder", "final", "pad")
"""A parameter is in the row of the first of these that it is in."""


@console.command
def verify(
    base: Annotated[str, typer.Argument(help="The model that the LoRA is for", metavar="BASE")],
    lora: Annotated[str, typer.Argument(help="A LoRA in any spelling: a file or a PEFT folder", metavar="LORA")],
    variant: Annotated[str, typer.Argument(help="The model that base + LoRA should be", metavar="VARIANT")],
    max_residual: Annotated[
        float | None, typer.Option(help="Largest overall residual after rounding, as in 0.1.", min=0.0)
    ] = None,
    strength: Annotated[str, typer.Option(help="Strength of the LoRA; any finite number.")] = "1",
    threads: Annotated[int | None, typer.Option(help="Worker threads [default: all cores]", min=1, max=256)] = None,
    as_json: JsonOption = False,
    no_progress: NoProgressOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Compare base + LoRA with the tuned model, layer by layer, before and after rounding; and say who loads the LoRA."""
    from mergetool.lora.verify import open_comparison, verify_lora
    from mergetool.options.kinds import with_strength

    path, factor = with_strength(f"x:{strength}")
    if path != "x":
        raise UsageError(f'--strength is a number such as 0.8, not "{strength}".')
    if max_residual is not None and not math.isfinite(max_residual):
        raise UsageError("--max-residual is a finite number such as 0.1.")
    started = time.monotonic()
    with open_comparison(base, lora, variant, strength=factor) as comparison:
        with console.progress("verify", comparison.bytes_read, shown=not (no_progress or as_json)) as bar:
            report = verify_lora(comparison, threads=threads, progress=bar)
        read = comparison.bytes_read
    residual = report.total(after=True)
    passed = max_residual is None or residual <= max_residual
    if as_json:
        console.print_json(_json(report) | {"max_residual": max_residual, "passed": passed})
    else:
        _print(report, read, time.monotonic() - started, verbose=verbose)
    if not passed:
        raise CheckFailed(
            f"{base} + {lora} is {residual:.4g} of the difference away from {variant}, where at most {max_residual:g} is allowed."
        )


def _print(report: LoraReport, read: int, seconds: float, *, verbose: bool) -> None:
    from mergetool.lora.verify import worst

    console.heading("left", f"of the difference tuned - base, at strength {report.strength:g}")
    rows = [_row(name, report, held) for name, held in _by_group(report).items()]
    changed = [one for one in report.residuals if one.changed]
    rows += [_row("changed", report, changed), _row("all", report, list(report.residuals))]
    console.table(["group", "parts", "changed", "share", "before rounding", "after rounding"], rows)
    for one in worst(report.residuals, len(report.residuals) if verbose else 4):
        what = "" if one.changed else ", not changed by the LoRA"
        console.heading("worst" if not verbose else "", f"{one.part}  {_both(one)}{what}")
    for reason, names in _by_reason(report.left_out).items():
        console.heading("left out", f"{len(names)} {reason}: {console.listed(names, most=1000 if verbose else 2)}")
    for reason, names in _by_reason(report.unmatched).items():
        console.heading("unread", f"{len(names)} keys, {reason}: {console.listed(names, most=1000 if verbose else 2)}")
    for warning in report.warnings:
        console.heading("warning", warning)
    loads.print_all(list(report.loading), verbose=verbose)
    console.heading("done", f"{_percent(report.total(after=True))} left  {console.size(read)} read  {seconds:.1f} s")


def _row(name: str, report: LoraReport, held: list[Residual]) -> list[str]:
    whole = math.fsum(one.delta for one in report.residuals)
    parts = {one.part for one in held}
    of_delta = math.fsum(one.delta for one in held)
    return [
        name,
        str(len(held)),
        str(sum(one.changed for one in held)),
        f"{100 * of_delta / whole:.3g} %" if whole else "0 %",
        _percent(report.total(wanted=lambda one: one.part in parts)),
        _percent(report.total(after=True, wanted=lambda one: one.part in parts)),
    ]


def _by_group(report: LoraReport) -> dict[str, list[Residual]]:
    rows: dict[str, list[Residual]] = {}
    for one in report.residuals:
        rows.setdefault(next((group for group in GROUPS if group in one.groups), "other"), []).append(one)
    return {group: rows[group] for group in (*GROUPS, "other") if group in rows}


def _by_reason(named: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, reason in named:
        found.setdefault(reason, []).append(name)
    return found


def _both(one: Residual) -> str:
    return f"{_percent(one.relative_before)} before, {_percent(one.relative_after)} after rounding"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if math.isfinite(share) else "more than nothing"


def _json(report: LoraReport) -> dict[str, Any]:
    return {
        "strength": report.strength,
        "residual_before": _number(report.total()),
        "residual_after": _number(report.total(after=True)),
        "layers": [
            {
                "name": one.part,
                "changed": one.changed,
                "delta": math.sqrt(one.delta),
                "residual_before": _number(one.relative_before),
                "residual_after": _number(one.relative_after),
            }
            for one in report.residuals
        ],
        "left_out": [{"name": name, "reason": reason} for name, reason in report.left_out],
        "unmatched": [{"key": key, "reason": reason} for key, reason in report.unmatched],
        "warnings": list(report.warnings),
        "loading": loads.as_json(list(report.loading)),
    }


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
