"""``mergetool lora verify``: does base + LoRA make the tuned model?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mergetool.api.lora_checks import LoraVerify, run_lora_verify
from mergetool.cli import console, loads
from mergetool.cli.parameters import Typed, command
from mergetool.cli.report import CommandEvents
from mergetool.errors import CheckFailed

if TYPE_CHECKING:
    from mergetool.api.lora_checks import LoraVerified
    from mergetool.lora.verify import LoraCheck, LoraReport, Residual

EXAMPLES = """\b
Examples:
  mergetool lora verify z-image tuned-minus-z-image.safetensors tuned.safetensors
  mergetool lora verify base.safetensors lora.safetensors tuned.safetensors --max-residual 0.2
  mergetool lora verify alkahest style.safetensors "alkahest + 2*(tuned - base)"
  mergetool lora verify base.safetensors lora.safetensors tuned.safetensors --strength 0.8 --json

The residual is the part of the difference tuned - base that the LoRA does not reproduce, as a share of its Frobenius norm. mergetool \
measures it before rounding (the factors alone) and after (baked into the base's dtype).
"""

GROUPS = ("attention", "ffn", "adaln", "norm", "embedder", "final", "pad")
"""A parameter is in the row of the first of these that it is in."""


@command(LoraVerify)
def verify(typed: Typed) -> None:
    """Check that base + LoRA gives the tuned model.

    mergetool compares them layer by layer and lists the programs that load the LoRA.
    """
    asked = typed.request(LoraVerify)
    with _VerifyReport.shown(typed) as report:
        result = run_lora_verify(asked, report)
    if not result.passed:
        raise CheckFailed(
            f"{asked.base} + {asked.lora} is {result.residual:.4g} of the difference away from {asked.variant}, "
            f"where at most {asked.max_residual:g} is allowed."
        )


class _VerifyReport(CommandEvents):
    """The residual of the LoRA."""

    def done(self, plan: LoraCheck, result: LoraVerified) -> None:
        """The residuals."""
        self.json |= _json(result.report) | {"max_residual": result.max_residual, "passed": result.passed}
        if self.prints:
            _print(result.report, result.bytes_read, result.seconds, verbose=self.typed.verbose)


def _print(report: LoraReport, read: int, seconds: float, *, verbose: bool) -> None:
    from mergetool.lora.verify import worst

    console.heading("left", f"of the difference tuned - base, at strength {report.strength:g}")
    rows = [_row(name, report, held) for name, held in _by_group(report).items()]
    changed = [residual for residual in report.residuals if residual.changed]
    rows += [_row("changed", report, changed), _row("all", report, list(report.residuals))]
    console.table(["group", "parts", "changed", "share", "before rounding", "after rounding"], rows)
    for residual in worst(report.residuals, len(report.residuals) if verbose else 4):
        unchanged = "" if residual.changed else ", not changed by the LoRA"
        console.heading("worst" if not verbose else "", f"{residual.part}  {_both(residual)}{unchanged}")
    for reason, names in _by_reason(report.left_out).items():
        console.heading("left out", f"{len(names)} {reason}: {console.listed(names, most=1000 if verbose else 2)}")
    for reason, names in _by_reason(report.unmatched).items():
        console.heading("unread", f"{len(names)} keys, {reason}: {console.listed(names, most=1000 if verbose else 2)}")
    for warning in report.warnings:
        console.heading("warning", warning)
    loads.print_all(list(report.loading), verbose=verbose)
    console.heading("done", f"{_percent(report.total(after=True))} left  {console.size(read)} read  {seconds:.1f} s")


def _row(name: str, report: LoraReport, held: list[Residual]) -> list[str]:
    whole = math.fsum(residual.delta for residual in report.residuals)
    parts = {residual.part for residual in held}
    of_delta = math.fsum(residual.delta for residual in held)
    return [
        name,
        str(len(held)),
        str(sum(residual.changed for residual in held)),
        f"{100 * of_delta / whole:.3g} %" if whole else "0 %",
        _percent(report.total(wanted=lambda residual: residual.part in parts)),
        _percent(report.total(after=True, wanted=lambda residual: residual.part in parts)),
    ]


def _by_group(report: LoraReport) -> dict[str, list[Residual]]:
    rows: dict[str, list[Residual]] = {}
    for residual in report.residuals:
        rows.setdefault(next((group for group in GROUPS if group in residual.groups), "other"), []).append(residual)
    return {group: rows[group] for group in (*GROUPS, "other") if group in rows}


def _by_reason(named: tuple[tuple[str, str], ...]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, reason in named:
        reasons.setdefault(reason, []).append(name)
    return reasons


def _both(residual: Residual) -> str:
    return f"{_percent(residual.relative_before)} before, {_percent(residual.relative_after)} after rounding"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if math.isfinite(share) else "more than nothing"


def _json(report: LoraReport) -> dict[str, Any]:
    return {
        "strength": report.strength,
        "residual_before": _number(report.total()),
        "residual_after": _number(report.total(after=True)),
        "layers": [
            {
                "name": residual.part,
                "changed": residual.changed,
                "delta": math.sqrt(residual.delta),
                "residual_before": _number(residual.relative_before),
                "residual_after": _number(residual.relative_after),
            }
            for residual in report.residuals
        ],
        "left_out": [{"name": name, "reason": reason} for name, reason in report.left_out],
        "unmatched": [{"key": key, "reason": reason} for key, reason in report.unmatched],
        "warnings": list(report.warnings),
        "loading": loads.as_json(list(report.loading)),
    }


def _number(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None
