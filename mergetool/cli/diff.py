"""``mergetool diff``: the difference of two checkpoints as a LoRA."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from mergetool.api.differences import Diff, run_diff
from mergetool.cli.diff_report import DiffReport
from mergetool.cli.parameters import Typed, command
from mergetool.errors import UsageError

EXAMPLES = """\b
Examples:
  mergetool diff --base lab.base --variant lab.striped --rank-thresh 0.995 --exclude refiner
  mergetool diff --base alkahest --variant turbo --rank-thresh 0.995 --exclude refiner
  mergetool diff --base alkahest --variant "alkahest + 20*(artshoot - 'z-image')" --rank 64
  mergetool diff --base base.safetensors --variant tuned.safetensors --rank 32 -o tuned.lora.safetensors
  mergetool diff --base z-image --variant tuned --include attention --include ffn --rank-max 128
  mergetool diff --base alkahest --variant turbo --budget 300MB --spectra turbo.spectra.safetensors
  mergetool diff --base alkahest --variant turbo --rule ratio --rank-thresh 0.05 --rank-max 0
  mergetool diff --base z-image --variant tuned.safetensors --variant2 b.safetensors -o common.safetensors
  mergetool diff --base z-image --variant tuned.safetensors --variant2 style.safetensors --union --weights 1,0.5 -o both.safetensors
  mergetool diff --base z-image --variant tuned --full tuned-full.safetensors --full-layer embedder --checkpoint check.safetensors

A variant may be a LoRA file or a PEFT folder in any spelling; its change to the base is then the difference. With --variant2 the LoRA has \
what two differences share, or with --union both, or with --orthogonal a part of the first (the page "LoRA sets" of the docs has the definitions).

\b
RULE says what --rank-thresh t measures; s1 >= s2 >= ... are the singular
values of one matrix of the difference, and r is its rank:
  energy  the fewest r with (s1^2 + ... + sr^2) / (sum of all s^2) >= t
  fro     the fewest r with the square root of that share >= t
  sum     the fewest r with (s1 + ... + sr) / (sum of all s) >= t
  ratio   all s > t * s1
  abs     all s > t
  knee    those before the point of the curve furthest below its chord; no t

With energy and fro, the factors reach t even after they are rounded for the file. sum and knee decompose every matrix whole, which takes \
longer.

PATTERN is a group that `mergetool inspect` lists (refiner, attention, ffn, q, layers.0-9 ...), a glob over tensor names \
("layers.*.attention.*") or re:REGEX.
"""


_OWN = [
    inspect.Parameter(
        "models",
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[list[str] | None, typer.Argument(metavar="BASE VARIANT", hidden=True)],
        default=None,
    )
]


@command(Diff, own=_OWN, filled=("base", "variant"))
def diff(typed: Typed) -> None:
    """Save the difference of two models as a LoRA.

    The LoRA is variant - base; ComfyUI and diffusers load it.

    Each matrix gets the smallest rank that provably keeps --rank-thresh of its energy, but at most --rank-max. With
    --budget, mergetool chooses the ranks that leave the least total error in a file of that size.
    """
    with DiffReport.shown(typed) as report:
        run_diff(typed.request(Diff, **_models(typed)), report)


def _models(typed: Typed) -> dict[str, str]:
    """Base and variant, each by its option or as an argument. Raises UsageError with the line that works."""
    given: list[str] = typed.own["models"] or []
    missing = [name for name in ("base", "variant") if name not in typed.given]
    if len(given) == len(missing):
        return dict(zip(missing, given, strict=True))
    raise UsageError(
        "a difference needs two models, the one that the LoRA is loaded on and the one that it should become: "
        "write mergetool diff --base MODEL --variant MODEL."
    )
