"""``mergetool lora subtract A B``, which is ``mergetool lora merge A B:-1``."""

from __future__ import annotations

from fractions import Fraction

from mergetool.api.loras import LoraMerge, LoraOrthogonal, run_lora_merge
from mergetool.cli.lora_sums import SumReport
from mergetool.cli.parameters import Typed, command


@command(LoraOrthogonal)
def subtract(typed: Typed) -> None:
    """Take B away from A: mergetool lora merge A B:-1."""
    given = {name: value for name, value in typed.given.items() if name not in ("first", "second")}
    loras = [(typed.given["first"], Fraction(1)), (typed.given["second"], Fraction(-1))]
    with SumReport.shown(typed) as report:
        run_lora_merge(LoraMerge(loras, **given), report)
